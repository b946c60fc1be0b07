"""The page on op rules: its example works, and what happens without a rule."""

import re

import pytest
from support.tooling import ROOT
from support.toys import Net, conv, grouped, images

from mmgfp.tracing import LABEL_RULES, trace_loss
from mmgfp.utils.errors import TraceError

PAGE = ROOT / 'docs' / 'op-rules.md'


def renormalising(dim):
    parts = dict(a=conv(3, 6), b=conv(6, 4))
    return Net(lambda net, x: net.b(net.a(x).renorm(2, dim, 1.0)), **parts)


@pytest.fixture
def example():
    (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    exec(compile(code, str(PAGE), 'exec'), {})
    yield
    del LABEL_RULES['Renorm']


def test_the_example(example):
    assert [(g.name, g.units) for g in grouped(renormalising(1)).groups] == [('a', 6)]
    frozen = grouped(renormalising(0)).frozen
    assert frozen[0].reason == 'channels are summed in a norm by Renorm'


def test_without_a_rule_op_and_layers_are_named():
    net = renormalising(1)
    loss = net(images()).sum()
    assert trace_loss(net, loss).unknown_ops == {'Renorm': ['a']}
    assert grouped(net).frozen[0].reason == 'read by Renorm, an op without a rule'
    with pytest.raises(TraceError, match='op Renorm after a.*mmgfp/tracing/rules'):
        trace_loss(net, loss, strict=True)


def test_every_module_of_rules_is_listed():
    folder = PAGE.parent.parent / 'mmgfp' / 'tracing' / 'rules'
    names = {p.name for p in folder.glob('*.py')} - {'__init__.py'}
    assert names == set(re.findall(r'^\| `(\w+\.py)`', PAGE.read_text(), re.MULTILINE))
