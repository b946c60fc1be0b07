"""Groups of small networks, worked out by hand: (tensor, dimension): entries a unit."""

import itertools

import numpy as np
import pytest
import torch
from support.toys import (
    Concat,
    ConvPair,
    DepthWise,
    FlattenLinear,
    GroupConv,
    GroupNormHead,
    Net,
    ResidualPair,
    Scaled,
    SharedHead,
    Shuffle,
    SqueezeExcite,
    TinyDetector,
    Transposed,
    conv,
    grouped,
    reasons_of,
    toy_forward,
    toy_loss,
    traced,
    widths,
)
from torch import nn
from torch.nn import functional as F

from mmgfp.discovery.discover import discover
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, find_disagreements
from mmgfp.groups import module_of
from mmgfp.utils.errors import ConfigError


def made(*layers, entries=1, bias=True):
    """Output dimension and bias of ``layers``, ``entries`` a unit."""
    names = ('weight', 'bias') if bias else ('weight',)
    return {(f'{layer}.{n}', 0): entries for layer in layers for n in names}


def tensors(*names):
    """The first dimension of tensors."""
    return {(name, 0): 1 for name in names}


def read(*layers, entries=1):
    """Input dimension of ``layers``."""
    return {(f'{layer}.weight', 1): entries for layer in layers}


def batch_norm(*layers):
    names = ('weight', 'bias', 'running_mean', 'running_var')
    return tensors(*(f'{layer}.{n}' for layer in layers for n in names))


def normed_conv(layer, norm):
    """A convolution without bias and its batch norm."""
    return made(layer, bias=False) | batch_norm(norm)


EXPECTED = {
    ConvPair: [(6, normed_conv('conv1', 'bn') | read('conv2'))],
    ResidualPair: [
        (6, made('stem') | normed_conv('conv2', 'bn2') | read('conv1', 'head')),
        (5, normed_conv('conv1', 'bn1') | read('conv2')),
    ],
    SharedHead: [
        (6, made('stem') | read('level1', 'level2')),
        (8, made('level1', 'level2') | read('tower')),
        (5, made('tower') | read('pred')),
    ],
    DepthWise: [(6, made('expand') | normed_conv('dw', 'bn') | read('project'))],
    GroupConv: [
        (4, made('stem', entries=2) | made('mid', entries=3) | read('head', entries=3))
    ],
    Concat: [(4, made('a') | read('head')), (6, made('b') | read('head'))],
    Shuffle: [
        (
            4,
            made('branch')
            | read('branch')
            | made('stem', entries=2)
            | read('head', entries=2),
        )
    ],
    GroupNormHead: [(4, made('conv', 'gn', entries=2) | read('pred', entries=2))],
    FlattenLinear: [
        (4, made('conv') | read('fc1', entries=4)),
        (5, made('fc1') | read('fc2')),
    ],
    Transposed: [
        (5, made('stem') | tensors('up.weight')),
        (6, {('up.weight', 1): 1, ('up.bias', 0): 1} | read('head')),
    ],
    Scaled: [(6, made('stem') | tensors('gamma') | read('head'))],
    SqueezeExcite: [
        (6, made('stem', 'expand') | read('squeeze', 'head')),
        (3, made('squeeze') | read('expand')),
    ],
    TinyDetector: [
        (4, normed_conv('stem', 'bn') | read('stage1')),
        (6, made('stage1') | read('lateral1', 'stage2')),
        (6, made('lateral1', 'lateral2') | read('fpn1', 'fpn2')),
        (8, made('stage2') | read('lateral2')),
        (6, made('fpn1', 'fpn2') | read('cls_tower', 'reg_tower')),
        (5, made('cls_tower') | read('cls_pred')),
        (5, made('reg_tower') | read('reg_pred')),
    ],
}


@pytest.mark.parametrize(
    ('toy', 'expected'), EXPECTED.items(), ids=[t.__name__ for t in EXPECTED]
)
def test_groups(toy, expected):
    grouping = grouped(toy())
    assert [(g.units, widths(g)) for g in grouping.groups] == expected
    assert grouping.units == sum(units for units, _ in expected)


def entries(grouping, name, dim):
    """Entries of (name, dim) by unit, unit by unit through all groups."""
    return [
        index
        for group in grouping.groups
        for member in group.members
        if (member.name, member.dim) == (name, dim)
        for index in member.index.tolist()
    ]


def test_units_of_a_concatenation_sit_behind_one_another():
    grouping = grouped(Concat())  # the image takes the head's inputs 0 to 2
    assert entries(grouping, 'head.weight', 1) == [[i] for i in range(3, 13)]
    assert grouping.inputs['head.weight'].tolist() == [-1] * 3 + list(range(10))


def test_units_of_a_shuffle():
    grouping = grouped(Shuffle())
    assert entries(grouping, 'stem.weight', 0) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert entries(grouping, 'branch.weight', 0) == [[0], [1], [2], [3]]
    assert entries(grouping, 'head.weight', 1) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_units_of_a_group_conv_are_its_conv_groups():
    grouping = grouped(GroupConv())
    assert entries(grouping, 'stem.weight', 0) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert entries(grouping, 'mid.weight', 0)[3] == [9, 10, 11]
    assert grouping.inputs['mid.weight'].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_units_of_a_flattened_map_are_its_channels():
    grouping = grouped(FlattenLinear())
    assert entries(grouping, 'fc1.weight', 1)[1] == [4, 5, 6, 7]
    assert grouping.inputs['fc1.weight'].tolist() == np.repeat(range(4), 4).tolist()


def test_units_of_a_seven_by_seven_roi_feature():
    net = Net(
        lambda net, x: net.fc(F.adaptive_avg_pool2d(net.a(x), 7).flatten(1)),
        a=conv(3, 5),
        fc=nn.Linear(5 * 49, 2),
    )
    (group,) = grouped(net).groups
    assert group.units == 5
    assert group.members[-1].index.tolist() == np.arange(245).reshape(5, 49).tolist()


def test_units_are_numbered_through_all_groups():
    grouping = grouped(ResidualPair())
    assert grouping.group_of.tolist() == [0] * 6 + [1] * 5
    assert grouping.inputs['conv2.weight'].tolist() == [6, 7, 8, 9, 10]
    assert grouping.inputs['conv1.weight'].tolist() == [0, 1, 2, 3, 4, 5]
    assert grouping.inputs['stem.weight'].tolist() == [-1, -1, -1]


def test_roles():
    (group,) = grouped(ConvPair()).groups
    assert (group.layers('out'), group.layers('in')) == (['conv1'], ['conv2'])
    assert group.layers('with') == ['bn'] * 4


# -- hard cases --


def chain(**parts):
    """Layers one after the other."""

    def run(net, x):
        for name in parts:
            x = net.get_submodule(name)(x)
        return x

    return Net(run, **parts)


def one_channel_gate():
    """A conv with one output channel beside a depth-wise one."""
    return Net(
        lambda net, x: net.head(net.dw(net.a(x)) * net.gate(net.a(x)).sigmoid()),
        a=conv(3, 6),
        dw=conv(6, 6, groups=6),
        gate=conv(6, 1),
        head=conv(6, 4),
    )


def depth_wise_with_multiplier():
    return chain(a=conv(3, 4), dw=conv(4, 12, groups=4), head=conv(12, 2))


def roi_scatter():
    """RoIs of two levels, written into one tensor and flattened."""

    def run(net, x):
        fine = net.fine(x)
        coarse = net.coarse(x)
        rois = fine.new_zeros(3, fine.shape[1], 2, 2)
        rois[torch.tensor([0, 2])] = fine[torch.tensor([1, 0]), :, :2, :2]
        rois[torch.tensor([False, True, False])] = coarse[:1, :, 1:3, 1:3]
        return net.fc((rois + coarse.sum() * 0).flatten(1))

    parts = dict(fine=conv(3, 4), coarse=conv(3, 4, stride=2), fc=nn.Linear(4 * 4, 2))
    return Net(run, **parts)


def tied():
    net = chain(stem=conv(3, 6), a=conv(6, 6), b=conv(6, 6), head=conv(6, 4))
    net.b.weight = net.a.weight
    return net


def normed(norm):
    return chain(a=conv(3, 6), norm=norm, b=conv(6, 4))


HARD = {
    'one channel beside depth-wise': (
        one_channel_gate,
        [(6, made('a', 'dw') | read('gate', 'head'))],
    ),
    'depth-wise with a multiplier': (
        depth_wise_with_multiplier,
        [(4, made('a') | made('dw', entries=3) | read('head', entries=3))],
    ),
    'RoI scatter': (roi_scatter, [(4, made('fine', 'coarse') | read('fc', entries=4))]),
    'tied weights': (
        tied,
        [(6, made('stem', 'a') | tensors('b.bias') | read('a', 'head'))],
    ),
    'BN without affine': (
        lambda: normed(nn.BatchNorm2d(6, affine=False)),
        [(6, made('a') | tensors('norm.running_mean', 'norm.running_var') | read('b'))],
    ),
    'BN without statistics': (
        lambda: normed(nn.BatchNorm2d(6, track_running_stats=False)),
        [(6, made('a', 'norm') | read('b'))],
    ),
    'frozen BN': (
        lambda: normed(nn.BatchNorm2d(6).requires_grad_(False).eval()),
        [(6, made('a') | batch_norm('norm') | read('b'))],
    ),
    'instance norm': (
        lambda: normed(nn.InstanceNorm2d(6, affine=True)),
        [(6, made('a', 'norm') | read('b'))],
    ),
}


@pytest.mark.parametrize(('make', 'expected'), HARD.values(), ids=HARD)
def test_hard_cases(make, expected):
    net = make()
    grouping = grouped(net)
    found = [(g.units, dict(sorted(widths(g).items()))) for g in grouping.groups]
    assert found == [(units, dict(sorted(w.items()))) for units, w in expected]
    assert find_disagreements(net, grouping, toy_forward) == []


def test_a_chain_of_single_channels_has_nothing_to_prune():
    grouping = grouped(chain(a=conv(3, 1), b=conv(1, 1), head=conv(1, 2)))
    assert grouping.groups == ()
    reasons = {f.layer: (f.reason, f.channels) for f in grouping.frozen}
    no_labels = 'its output channels carry no labels'
    assert reasons['a'] == reasons['b'] == (no_labels, 1)
    assert grouping.inputs['head.weight'].tolist() == [-1]


def test_channels_that_are_all_one_unit_stay():
    grouping = grouped(normed(nn.GroupNorm(1, 6)))
    assert grouping.groups == ()
    assert grouping.frozen[0].reason == 'all its channels are one unit'


def test_a_group_conv_on_the_image_stays():
    (a, _) = grouped(chain(a=conv(3, 6, groups=3), head=conv(6, 2))).frozen
    words = 'input channels that no layer makes are read by Convolution'
    assert (a.layer, a.channels, a.reason) == ('a', 6, words)


class PaddedShortcut(nn.Module):
    """ResNet's option A: 4 channels are padded to 8 with zeros."""

    def __init__(self, pad):
        super().__init__()
        self.stem, self.down = conv(3, 4), conv(4, 8, stride=2)
        self.head = conv(8, 2)
        self.pad = pad

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.down(x) + self.pad(x[:, :, ::2, ::2]))


def padded(x):
    return F.pad(x, (0, 0, 0, 0, 2, 2))


def joined_with_zeros(x):
    return torch.cat([x, torch.zeros_like(x)], 1)


@pytest.mark.parametrize(
    ('pad', 'stem', 'alone'),
    [(padded, [2, 3, 4, 5], [0, 1, 6, 7]), (joined_with_zeros, [0, 1, 2, 3], None)],
)
def test_a_zero_padded_shortcut(pad, stem, alone):
    """Padded channels of the residual branch are on their own, by position."""
    net = PaddedShortcut(pad)
    first, second = grouped(net).groups
    down = {m.name: m.index.ravel().tolist() for m in first.members if m.dim == 0}
    assert down['stem.weight'] == [0, 1, 2, 3]
    assert down['down.weight'] == stem
    assert second.members[0].index.ravel().tolist() == (alone or [4, 5, 6, 7])


def to_both_sides(x, y):
    missing = (y.shape[1] - x.shape[1]) // 2
    return F.pad(x, (0, 0, 0, 0, missing, missing))


def in_two_steps(x, y):
    missing = (y.shape[1] - x.shape[1]) // 2
    x = F.pad(x, (0, 0, 0, 0, missing, 0), value=0.5)
    return F.pad(x, (0, 0, 0, 0, 0, missing))


def unevenly(x, y):
    """Right for all sets of channels without the first one."""
    missing = y.shape[1] - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, missing // 4, missing - missing // 4))


def by_zeros(x, y):
    zeros = torch.zeros_like(y[:, : (y.shape[1] - x.shape[1]) // 2])
    return torch.cat([torch.cat([zeros, x], 1), zeros], 1)


def to_one_side(x, y):
    return F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


def found_with(fit):
    """What is found where 4 channels are made to fit to 8 by ``fit``."""

    def run(net, x):
        x = net.stem(net.first(x).relu())
        y = net.down(x)
        return net.head(y + fit(x, y))

    parts = dict(first=conv(3, 5), stem=conv(5, 4), down=conv(4, 8), head=conv(8, 2))
    return discover(Net(run, **parts), toy_loss, toy_forward, 2).grouping


@pytest.mark.parametrize(
    ('fit', 'op'),
    [
        (to_both_sides, 'padded by ConstantPadNd'),
        (unevenly, 'padded by ConstantPadNd'),
        (in_two_steps, 'padded by ConstantPadNd'),
        (by_zeros, 'joined with a constant by Cat'),
    ],
)
def test_padding_that_is_read_off_tensors_is_named(fit, op):
    """The channels that meet zeros stay; with the others as many go on either side."""
    grouping = found_with(fit)
    assert {g.name: g.units for g in grouping.groups} == {'first': 5, 'stem': 4}
    (down,) = [f for f in grouping.frozen if f.layer == 'down']
    assert down.channels == 4
    assert down.reason.startswith('masked and compact disagree: ')
    assert f'; channels are {op}; if the code' in down.reason
    assert down.reason.endswith('replace it by a 1x1 convolution')


def test_padding_at_the_end_alone_may_follow_sizes():
    """The 4 channels of down that meet zeros can go, since fewer zeros are added."""
    units = {g.name: g.units for g in found_with(to_one_side).groups}
    assert units == {'first': 5, 'stem': 4, 'down': 4}


def test_constants_as_wide_as_the_channels_fail_verification():
    """What is no operand in the graph shows when the compact network runs."""
    mask = torch.ones(6, 1, 1, dtype=torch.bool)
    net = normed(Net(lambda net, x: x * mask))
    (wrong,) = find_disagreements(net, grouped(net), toy_forward)
    assert wrong.group.name == 'a'
    assert 'must match the size' in wrong.reason


# -- what stays --


def test_keep_leaves_both_sides_of_a_layer_alone():
    grouping = grouped(TinyDetector(), keep=['lateral1'])
    names = [g.name for g in grouping.groups]
    assert names == ['stem', 'stage2', 'fpn1', 'cls_tower', 'reg_tower']
    for layer in ('stage1', 'lateral1', 'lateral2'):
        assert reasons_of(grouping)[layer] == 'kept as configured'


@pytest.mark.parametrize(
    ('keep', 'names'),
    [
        (['level*'], ['tower']),
        (['tower', 'stem'], []),
        (['pred'], ['stem', 'level1']),
        (['*'], []),
        ([], ['stem', 'level1', 'tower']),
    ],
)
def test_keep_patterns(keep, names):
    assert [g.name for g in grouped(SharedHead(), keep=keep).groups] == names


def test_keep_of_a_group_conv_keeps_what_it_reads():
    assert grouped(GroupConv(), keep=['mid']).groups == ()


def test_keep_finds_tied_weights_under_either_name():
    frozen = reasons_of(grouped(tied(), keep=['b']))
    assert frozen['stem'] == frozen['a'] == frozen['b'] == 'kept as configured'


def test_keep_finds_shared_modules_under_either_name():
    net = SharedHead()
    net.alias = net.tower
    assert [g.name for g in grouped(net, keep=['alias']).groups] == ['stem']


def test_keep_of_nothing_is_refused():
    words = r"keep must be .*patterns of Conv/FC layers.* \(got 'level3\.\*'"
    with pytest.raises(ConfigError, match=words):
        grouped(SharedHead(), keep=['stem', 'level3.*'])


def test_a_group_is_frozen_with_its_reason():
    net = SharedHead()
    trace = traced(net)
    level = build_groups(net, trace).groups[1]
    grouping = build_groups(net, trace, frozen_groups=[(level, 'it failed')])
    assert [g.name for g in grouping.groups] == ['stem', 'tower']
    frozen = reasons_of(grouping)
    assert frozen['level1'] == frozen['level2'] == 'it failed'


def test_layers_without_a_view_of_their_inputs_freeze_what_they_read():
    net = ResidualPair()
    grouping = build_groups(net, traced(net), unscorable={'conv2.weight': 'hidden'})
    assert [g.name for g in grouping.groups] == ['stem']
    (conv1, _) = grouping.frozen
    assert (conv1.layer, conv1.reason) == ('conv1', 'read by conv2: hidden')


def test_the_last_layer_is_an_output():
    (frozen,) = grouped(ConvPair()).frozen
    words = 'an output: reaches the loss without a further layer'
    assert (frozen.layer, frozen.channels, frozen.reason) == ('conv2', 4, words)


def test_module_of():
    assert module_of('neck.conv.weight') == 'neck.conv'
    assert module_of('weight') == ''


def test_weights_that_a_controller_makes_freeze_both_factors():
    """Its kernels depend on the image, though the image itself is in no graph."""

    def run(net, x):
        kernels = net.controller(net.a(x)).mean((2, 3))  # (N, 6)
        y = F.conv2d(net.b(x), kernels[:, :, None, None])
        return net.head(net.last(y.relu()))

    parts = dict(a=conv(3, 5), controller=conv(5, 6), b=conv(3, 6), head=conv(4, 4))
    # The last layer reads one channel for each of the two images.
    grouping = grouped(Net(run, last=conv(2, 4), **parts))
    assert [g.name for g in grouping.groups] == ['a', 'last']
    reasons = reasons_of(grouping)
    what = 'multiplied with an activation by Convolution'
    assert what in reasons['b'] and what in reasons['controller']


def test_a_shared_layer_that_also_reads_the_image_reads_all_channels():
    """What it reads in one call cannot go, as the image keeps its channels."""
    parts = dict(a=conv(3, 3), shared=conv(3, 5), head=conv(5, 4))
    net = Net(lambda n, x: n.head(n.shared(x) + n.shared(n.a(x))), **parts)
    grouping = grouped(net)
    assert [g.name for g in grouping.groups] == ['shared']
    assert 'channels that no layer makes' in reasons_of(grouping)['a']
    assert find_disagreements(net, grouping, toy_forward) == []


def test_a_layer_that_is_read_either_way_round_counts_its_own_outputs():
    """Its weight (6, 4) makes 6 channels, and by its transpose 4 further ones."""

    def run(net, x):
        y = net.b(net.a(x).mean((2, 3))).relu()
        return net.head(F.linear(y, net.b.weight.t()))

    net = Net(run, a=conv(3, 4), b=nn.Linear(4, 6), head=nn.Linear(4, 2))
    frozen = {f.layer: f.channels for f in grouped(net, keep=['b']).frozen}
    assert frozen == {'a': 4, 'b': 6, 'head': 2}


class TiedAutoencoder(nn.Module):
    """Decodes with the weights of the encoder, beside a layer that reads the code.

    Hidden channels are both made and read along the same dimension of the weights.
    """

    def __init__(self, sizes, transposed, act):
        super().__init__()
        layer = (lambda a, b: conv(a, b)) if transposed else nn.Linear
        pairs = list(itertools.pairwise(sizes))
        self.encoder = nn.ModuleList(layer(*pair) for pair in pairs)
        self.biases = nn.ParameterList(torch.randn(size) for size, _ in pairs)
        self.head, self.act = layer(sizes[-1], 3), act

    def forward(self, x):
        if isinstance(self.head, nn.Linear):
            x = x.mean(3).transpose(1, 2)
        for layer in self.encoder:
            x = self.act(layer(x))
        code = self.head(x)
        for layer, bias in zip(
            reversed(self.encoder), reversed(self.biases), strict=True
        ):
            if isinstance(layer, nn.Linear):
                x = F.linear(self.act(x), layer.weight.t(), bias)
            else:
                x = F.conv_transpose2d(self.act(x), layer.weight, bias, padding=1)
        return x, code


@pytest.mark.parametrize('seed', range(12))
def test_tied_autoencoders(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    sizes = [3, *rng.integers(3, 9, rng.integers(1, 4)).tolist()]
    act = (torch.relu, torch.tanh, torch.sigmoid)[seed % 3]
    net = TiedAutoencoder(sizes, transposed=seed % 2, act=act)
    groups = grouped(net).groups
    assert [g.units for g in groups] == sizes[1:]
    assert groups[0].members[0].role == 'both'
    for share in (0.2, 0.5, 0.9):
        kept = random_units(groups, share, rng)
        assert disagreement(net, groups, kept, toy_forward) is None
