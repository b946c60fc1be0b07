"""What a walk over the graph finds, and what it leaves as it was."""

import random

import numpy as np
import pytest
import torch
from support.toys import (
    TOYS,
    Concat,
    ConvPair,
    Net,
    ResidualPair,
    SharedHead,
    conv,
    grouped,
    images,
    reasons_of,
    square_loss,
    traced,
)
from torch import nn
from torch.autograd import Function

from mmgfp.tracing import NO_LABEL, trace_loss
from mmgfp.utils.errors import TraceError
from mmgfp.utils.trial_runs import undisturbed


class Mystery(Function):
    """An op that no rule describes."""

    @staticmethod
    def forward(ctx, *tensors):
        return torch.cat(tensors, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(2, 1)


def two_into_mystery():
    parts = dict(a=conv(3, 6), b=conv(3, 6), head=conv(12, 4))
    return Net(lambda n, x: n.head(Mystery.apply(n.a(x), n.b(x).relu())), **parts)


def names(grouping):
    return [g.name for g in grouping.groups]


def reason(grouping, layer):
    return reasons_of(grouping)[layer]


# -- ops without a rule --


def test_an_op_without_a_rule_freezes_all_that_it_reads():
    net = two_into_mystery()
    assert traced(net).unknown_ops == {'Mystery': ['a', 'b']}
    grouping = grouped(net)
    assert names(grouping) == []
    for layer in 'ab':
        assert reason(grouping, layer) == 'read by Mystery, an op without a rule'


def test_strict_names_the_op_its_layers_and_where_rules_go():
    words = r'op Mystery after a, b must have a rule.*mmgfp/tracing/rules'
    with pytest.raises(TraceError, match=words):
        traced(two_into_mystery(), strict=True)


def test_strict_accepts_ops_whose_rule_is_to_freeze():
    net = Net(lambda net, x: net.b(net.a(x).softmax(1)), a=conv(3, 6), b=conv(6, 4))
    assert traced(net, strict=True).unknown_ops == {}


def test_an_op_without_a_rule_behind_the_last_layer_is_an_output():
    net = ConvPair()

    def loss(net):
        out = net(images())
        return Mystery.apply(out, out).square().mean()

    assert traced(net, loss, strict=True).unknown_ops == {}
    assert names(grouped(net, loss)) == ['conv1']


def test_a_loss_without_a_graph_is_refused():
    with pytest.raises(TraceError, match='loss must be a tensor with an autograd gr'):
        trace_loss(ConvPair(), torch.tensor(1.0))


# -- what reaches the loss --


@pytest.fixture
def pair_with_branch():
    """A pair of convs, and a third conv beside them that only `extra` uses."""
    parts = dict(a=conv(3, 6), head=conv(6, 4), branch=conv(6, 5))
    return Net(lambda net, x: net.head(net.a(x)), **parts)


def with_extra(extra):
    def loss(net):
        return square_loss(net(images())) + extra(net, net.a(images()))

    return loss


NOTHING = {
    'sum times zero': lambda net, feats: feats.sum() * 0,
    'zero times sum': lambda net, feats: 0 * feats.sum(),
    'a zero tensor': lambda net, feats: torch.tensor(0.0) * feats.square().mean(),
    'a loss weight of zero': lambda net, feats: feats.square().mean() * 0.0,
}


@pytest.mark.parametrize('extra', NOTHING.values(), ids=NOTHING)
def test_what_is_multiplied_by_zero_is_no_output(pair_with_branch, extra):
    grouping = grouped(pair_with_branch, with_extra(extra))
    assert names(grouping) == ['a']
    assert reason(grouping, 'head').startswith('an output')


@pytest.mark.parametrize(
    'extra',
    [
        lambda net, feats: feats.square().mean() * 0.1,
        lambda net, feats: (feats * torch.zeros(6, 8, 8)).sum(),
    ],
    ids=['a feature in the loss', 'a zero for each element'],
)
def test_a_feature_that_reaches_the_loss_stays(pair_with_branch, extra):
    grouping = grouped(pair_with_branch, with_extra(extra))
    assert names(grouping) == []
    assert reason(grouping, 'a').startswith('an output: reaches the loss')


def test_a_level_without_rois_ties_nothing(pair_with_branch):
    """An extractor adds the sum of an unused level times zero to its features."""

    def loss(net):
        feats = net.a(images())
        unused = net.branch(feats).relu()
        return square_loss(net.head(feats + unused.sum() * 0))

    grouping = grouped(pair_with_branch, loss)
    assert names(grouping) == ['a']
    assert reason(grouping, 'branch') == 'no further layer reads its output'


def test_an_image_without_rois_ties_nothing():
    def run(net, x):
        y = net.a(x)
        none = y[torch.tensor([False, False])]
        return net.head(torch.cat([y, none[:1], none[0:0]]))

    assert names(grouped(Net(run, a=conv(3, 6), head=conv(6, 4)))) == ['a']


def test_a_layer_that_did_not_run_is_reported(pair_with_branch):
    grouping = grouped(pair_with_branch)
    (branch,) = [f for f in grouping.frozen if f.layer == 'branch']
    assert (branch.reason, branch.channels) == ('took no part in the loss', 5)


# -- calls --


def test_calls_in_the_order_of_the_data():
    layers = ['stem', 'level1', 'tower', 'pred', 'level2', 'tower', 'pred']
    calls = [c.weight for c in traced(SharedHead()).calls]
    assert calls == [f'{layer}.weight' for layer in layers]


def test_calls_know_their_input_labels():
    trace = traced(Concat())
    (call,) = [c for c in trace.calls if c.weight == 'head.weight']
    image, a, b = call.inputs.split([3, 4, 6])
    assert image.tolist() == [NO_LABEL] * 3
    assert a.tolist() == trace.table.vectors['a.weight', 0].tolist()
    assert b.tolist() == trace.table.vectors['b.weight', 0].tolist()


def test_shapes_are_those_of_the_model():
    net = ConvPair()
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    assert traced(net).shapes == shapes


# -- the model is left as it was --


@pytest.mark.parametrize('toy', TOYS)
def test_tracing_leaves_no_trace(toy):
    net = toy()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def loss(net):
        torch.rand(1), np.random.rand(), random.random()
        net.eval()
        return square_loss(net.train()(images()))

    traced(net, loss)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert all(p.grad is None for p in net.parameters())


def test_modes_and_buffers_come_back_after_an_error():
    net = ConvPair()
    net.bn.eval()
    mean = net.bn.running_mean.clone()
    with pytest.raises(ZeroDivisionError), undisturbed(net):
        net.train()(images())
        assert not torch.equal(net.bn.running_mean, mean)
        raise ZeroDivisionError
    assert net.training
    assert not net.bn.training
    assert torch.equal(net.bn.running_mean, mean)


def test_frozen_stages_are_seen_and_stay_frozen():
    net = ResidualPair()
    net.stem.requires_grad_(False)
    net.bn1.requires_grad_(False)
    assert names(grouped(net)) == ['stem', 'conv1']
    stay = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert stay == ['stem.weight', 'stem.bias', 'bn1.weight', 'bn1.bias']


@pytest.mark.parametrize('toy', TOYS)
def test_two_traces_agree(toy):
    first, second = grouped(toy()), grouped(toy())
    assert names(first) == names(second)
    assert first.frozen == second.frozen
    for a, b in zip(first.groups, second.groups, strict=True):
        for one, other in zip(a.members, b.members, strict=True):
            assert (one.name, one.dim, one.role) == (other.name, other.dim, other.role)
            assert (one.index == other.index).all()


def test_a_parameter_that_is_no_layer_weight_is_followed():
    net = Net(
        lambda net, x: nn.functional.conv2d(net.a(x), net.weight),
        a=conv(3, 6),
        weight=nn.Parameter(torch.rand(4, 6, 1, 1)),
    )
    (call,) = [c for c in traced(net).calls if c.weight == 'weight']
    assert len(call.inputs) == 6
    assert names(grouped(net)) == ['a']
