"""The compact network: what remains of it, and that it computes what the mask did."""

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.layers import DyReLU
from support.toys import (
    TOYS,
    ConvPair,
    DepthWise,
    FlattenLinear,
    GroupConv,
    GroupNormHead,
    Net,
    ResidualPair,
    TinyDetector,
    Transposed,
    conv,
    grouped,
    images,
    square_loss,
    structure_of,
    toy_forward,
    widths,
)
from torch import nn

from mmgfp.discovery.comparing import difference
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, masked_and_compact
from mmgfp.surgery.compact import compact, compact_
from mmgfp.surgery.structure import PruneStructure, shapes_of


def without(net, gone):
    """Return a compact copy of ``net`` without these units, and its structure."""
    structure = structure_of(net, gone)
    return compact(net, structure), structure


def pair(toy):
    """A masked and a compact copy of a toy in double precision."""
    torch.manual_seed(0)
    net = toy().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # else a zero bias hides the mask
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    groups = grouped(net).groups
    kept = random_units(groups, 0.4, np.random.default_rng(0))
    structure = PruneStructure.of(groups, kept, shapes_of(net))
    return *masked_and_compact(net, groups, kept), structure, images().double()


def slices(tensor, structure, name):
    """The entries of ``tensor`` that the structure keeps."""
    for dim, kept in structure.kept.get(name, {}).items():
        tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


# -- numbers --


@pytest.mark.parametrize('toy', TOYS)
def test_masked_and_compact_agree_in_eval(toy):
    masked, small, _, x = pair(toy)
    with torch.no_grad():
        assert difference(masked.eval()(x), small.eval()(x)) < 1e-10


@pytest.mark.parametrize('toy', TOYS)
def test_one_training_step_is_the_same(toy):
    """Loss, gradients of what is kept, statistics and the loss after the step."""
    masked, small, structure, x = pair(toy)
    losses = {}
    for name, net in (('masked', masked), ('compact', small)):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        loss = square_loss(net.train()(x))
        loss.backward()
        optimizer.step()
        losses[name] = [loss.item(), square_loss(net(x)).item()]
    assert losses['masked'] == pytest.approx(losses['compact'], rel=1e-9)
    assert losses['masked'][0] != losses['masked'][1]
    grown = dict(masked.named_parameters())
    for name, parameter in small.named_parameters():
        expected = slices(grown[name].grad, structure, name)
        torch.testing.assert_close(parameter.grad, expected)
    for name, tensor in small.state_dict().items():
        expected = slices(masked.state_dict()[name], structure, name)
        torch.testing.assert_close(tensor, expected)


def test_weights_that_stay_are_kept():
    net = ResidualPair()
    small, _ = without(net, [0, 7, 8])  # output 0 of stem; outputs 1 and 2 of conv1
    weight = net.conv1.weight
    assert torch.equal(small.conv1.weight, weight[[0, 3, 4]][:, 1:])
    assert torch.equal(small.conv2.weight, net.conv2.weight[1:][:, [0, 3, 4]])
    assert torch.equal(small.stem.bias, net.stem.bias[1:])
    assert torch.equal(small.bn1.running_var, net.bn1.running_var[[0, 3, 4]])
    assert torch.equal(small.head.bias, net.head.bias)


# -- modules --


def test_in_place_and_on_a_copy():
    net = ConvPair()
    _, structure = without(net, [2])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = compact(net, structure)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert compact_(net, structure) is net
    assert list(net.state_dict()) == list(small.state_dict()) == list(before)
    assert difference(list(net.parameters()), list(small.parameters())) == 0
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    assert [n for n, _ in net.named_buffers()] == [f'bn.{n}' for n in buffers]
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def attributes(module):
    names = (
        'in_channels', 'out_channels', 'groups', 'num_features', 'num_channels',
        'num_groups', 'in_features', 'out_features', 'num_parameters',
    )  # fmt: skip
    return {n: getattr(module, n) for n in names if hasattr(module, n)}


def conv_sizes(c_in, c_out, groups=1):
    return {'in_channels': c_in, 'out_channels': c_out, 'groups': groups}


def fc_sizes(c_in, c_out):
    return {'in_features': c_in, 'out_features': c_out}


@pytest.mark.parametrize(
    ('toy', 'gone', 'expected'),
    [
        (ConvPair, [0, 1], {'conv1': conv_sizes(3, 4), 'conv2': conv_sizes(4, 4)}),
        (ConvPair, [0, 1], {'bn': {'num_features': 4}}),
        (DepthWise, [5], {'expand': conv_sizes(3, 5), 'dw': conv_sizes(5, 5, 5)}),
        (GroupConv, [0, 3], {'stem': conv_sizes(3, 4), 'mid': conv_sizes(4, 6, 2)}),
        (
            GroupNormHead,
            [1],
            {'conv': conv_sizes(3, 6), 'gn': {'num_channels': 6, 'num_groups': 3}},
        ),
        (FlattenLinear, [0, 4, 5], {'fc1': fc_sizes(12, 3), 'fc2': fc_sizes(3, 3)}),
        (Transposed, [0, 5, 6], {'stem': conv_sizes(3, 4), 'up': conv_sizes(4, 4)}),
        (Transposed, [0, 5, 6], {'head': conv_sizes(4, 4)}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else '',
)
def test_attributes_are_true(toy, gone, expected):
    small, _ = without(toy(), gone)
    found = {name: attributes(small.get_submodule(name)) for name in expected}
    assert found == expected


def test_attributes_of_a_prelu():
    parts = dict(a=conv(3, 6), act=nn.PReLU(6), b=conv(6, 4))
    net = Net(lambda net, x: net.b(net.act(net.a(x))), **parts)
    small, _ = without(net, [2, 3])
    assert attributes(small.act) == {'num_parameters': 4}


def test_attributes_of_conv_modules():
    norm = dict(type='BN')
    net = Net(
        lambda net, x: net.out(net.dw(net.expand(x))),
        expand=ConvModule(3, 6, 1, norm_cfg=norm),
        dw=ConvModule(6, 6, 3, padding=1, groups=6, norm_cfg=norm),
        out=ConvModule(6, 4, 1),
    )
    small, _ = without(net, [0, 2])
    assert attributes(small.expand) == conv_sizes(3, 4)
    assert attributes(small.dw) == attributes(small.dw.conv) == conv_sizes(4, 4, 4)
    assert attributes(small.out) == conv_sizes(4, 4)
    assert small.dw.bn.num_features == 4


def test_frozen_parameters_stay_frozen():
    net = ConvPair()
    net.conv1.requires_grad_(False)
    small = without(net, [3])[0]
    assert small.conv1.weight.shape[0] == 5 and not small.conv1.weight.requires_grad
    assert small.conv2.weight.requires_grad


def test_tied_weights_stay_tied():
    net = Net(
        lambda net, x: net.head(net.b(net.a(net.stem(x)))),
        stem=conv(3, 6),
        a=conv(6, 6, bias=False),
        b=conv(6, 6, bias=False),
        head=conv(6, 4),
    )
    net.b.weight = net.a.weight
    small, _ = without(net, [0])
    assert small.a.weight is small.b.weight
    assert attributes(small.a) == attributes(small.b) == conv_sizes(5, 5)
    assert small.state_dict()['b.weight'].shape == (5, 5, 3, 3)


def test_shared_modules_stay_shared():
    net = TinyDetector()
    net.alias = net.cls_tower
    small, _ = without(net, [0, -1])
    assert small.alias is small.cls_tower


def test_untouched_tensors_are_not_copied():
    net = ConvPair()
    _, structure = without(net, [1])
    bias = net.conv2.bias
    compact_(net, structure)
    assert net.conv2.bias is bias


def test_dynamic_relu_counts_the_channels_that_it_splits_into():
    """One channel of ``a`` takes along the four coefficients that scale it."""
    parts = dict(a=conv(3, 8), relu=DyReLU(8), head=conv(8, 4))
    net = Net(lambda net, x: net.head(net.relu(net.a(x))), **parts)
    groups = grouped(net).groups
    assert {g.name: g.units for g in groups} == {'a': 8, 'relu.conv1.conv': 2}
    assert widths(groups[0])['relu.conv2.conv.weight', 0] == 4
    kept = random_units(groups, 0.4, np.random.default_rng(0))
    assert disagreement(net, groups, kept, toy_forward) is None
    _, small = masked_and_compact(net, groups, kept)
    assert small.relu.channels == small.a.out_channels == 5
