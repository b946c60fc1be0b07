"""The page on extending: its three files, outside of the package, drive a run."""

import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from support.configs import small_prune_config
from support.pages import read
from support.toy_runner import hook_of
from support.toys import Net, conv, images, toy_loss
from torch.nn import functional as F

from mmgfp import ChannelPruner
from mmgfp.criteria.base import CRITERIA
from mmgfp.selection.costs import COSTS
from mmgfp.selection.schedules import SCHEDULES

BLOCKS = read('docs/extending.md').blocks()
FILES = {b.split('\n')[0].removeprefix('# '): b for b in BLOCKS if b.startswith('# ')}


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The page's files where Python finds them, as a user has them; later forgotten."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    names = {'l1_norm': CRITERIA, 'traffic': COSTS, 'halving': SCHEDULES}
    for name, registry in names.items():
        if name in registry:
            registry.remove(name)
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def test_config_with_a_criterion_a_cost_and_a_schedule_of_its_own(extended, capfd):
    """The hook reads them from a config that is saved and loaded as a file."""
    assert sorted(FILES) == ['halving.py', 'l1_norm.py', 'traffic.py']
    config = small_prune_config(extended)
    (extended / 'mine.py').write_text(BLOCKS[-1])
    mine = Config.fromfile(extended / 'mine.py', import_custom_modules=True)
    config.custom_hooks = mine.custom_hooks
    config.custom_imports.imports += mine.custom_imports.imports
    config.dump(extended / 'run.py')
    config = Config.fromfile(extended / 'run.py')
    runner = Runner.from_cfg(config)
    runner.train()
    pruner = hook_of(runner).pruner
    assert type(pruner.criterion).__name__ == 'L1Norm'
    assert type(pruner.schedule).__name__ == 'HalvingSchedule'
    (artifact,) = Path(config.work_dir).glob('run_traffic70.pth')
    costs = torch.load(artifact, weights_only=True)['meta']['costs']
    assert 0.65 < costs['traffic']['ratio'] <= 0.7
    assert re.search(r'traffic [\d.]+ M \(\d\d\.\d%\)', capfd.readouterr().out)


def test_scores_and_costs_are_what_the_page_says(extended):
    """By hand on a chain; units that were cut out keep their numbers."""
    import_module('l1_norm')
    import_module('traffic')
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=conv(3, 4, 1), b=conv(4, 2, 1))
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([4.0, 2, 1, 3])[:, None, None, None])
    options = dict(criterion='l1_norm', normalize='none', target=dict(flops=0.3))
    pruner = ChannelPruner(net, interval=1, **options)
    pruner.prepare(toy_loss, toy_loss, 2)
    assert pruner.criterion.scores().values.tolist() == [12, 6, 3, 9]
    positions = images()[0, 0].numel()
    weights = 12 + 8
    assert pruner.units.full['traffic'] == weights + (4 + 2) * positions
    toy_loss(net).backward()
    assert pruner.step().units.tolist() == [2]
    pruner.compact_()
    values = pruner.criterion.scores().values
    assert np.nan_to_num(values, nan=-1).tolist() == [12, 6, -1, 9]


def test_layer_that_fisher_cannot_watch_may_be_pruned_by_weights(extended):
    """A weight used by a function has no module call to tap."""
    import_module('l1_norm')

    def run(net, x):
        return F.conv2d(net.a(x).relu(), net.b.weight, net.b.bias)

    def build(criterion):
        net = Net(run, a=conv(3, 4, 1), b=conv(4, 2, 1))
        pruner = ChannelPruner(net, criterion=criterion)
        return pruner.discover(toy_loss, toy_loss, 2).grouping

    with pytest.raises(Exception, match='its input cannot be watched for Fisher'):
        build('fisher')
    assert [(g.name, g.units) for g in build('l1_norm').groups] == [('a', 4)]
