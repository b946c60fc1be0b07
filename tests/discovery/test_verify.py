"""Verification finds wrong groups, tells them from right ones, and disturbs nothing."""

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
from support.toys import (
    TOYS,
    ConvPair,
    Net,
    ResidualPair,
    SharedHead,
    TinyDetector,
    conv,
    grouped,
    images,
    reasons_of,
    square_loss,
    toy_forward,
    toy_loss,
)
from torch import nn
from torch.nn import functional as F

from mmgfp import GroupFisherPruner
from mmgfp.discovery.comparing import TOLERANCE, difference
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import (
    Disagreement,
    disagreement,
    find_disagreements,
    masked_and_compact,
)
from mmgfp.groups import Grouping
from mmgfp.utils.errors import TraceError


def misplaced(grouping, group, name):
    """The grouping, with the units of a member in another order."""
    groups = list(grouping.groups)
    members = [
        dataclasses.replace(m, index=np.roll(m.index, 1, 0)) if m.name == name else m
        for m in groups[group].members
    ]
    groups[group] = dataclasses.replace(groups[group], members=tuple(members))
    return Grouping(tuple(groups), grouping.frozen, grouping.inputs)


# -- outputs --


def test_difference_by_hand():
    a = torch.tensor([1.0, -4.0])
    assert difference(a, a + torch.tensor([0.0, 1.0])) == pytest.approx(0.25)
    assert difference([a, a], (a, a)) == 0
    assert difference({'x': a, 'y': 1}, {'x': a * 1.5, 'y': 2}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ('a', 'b'),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.tensor([float('nan')]), torch.tensor([float('nan')])),
        (torch.tensor([float('inf')]), torch.tensor([float('inf')])),
        ([], []),
        (torch.tensor([1]), torch.tensor([1])),
    ],
    ids=['shapes', 'nan', 'inf', 'nothing', 'only integers'],
)
def test_what_cannot_be_compared_differs(a, b):
    assert difference(a, b) == float('inf')


def test_another_number_of_outputs():
    with pytest.raises(ValueError, match='zip'):
        difference([torch.ones(1)], [torch.ones(1)] * 2)


# -- random units --


def test_random_units_of_every_group():
    groups = grouped(SharedHead()).groups  # 6, 8 and 5 units
    kept = random_units(groups, 0.5, np.random.default_rng(0))
    assert [part.sum() for part in np.split(kept, [6, 14])] == [3, 4, 3]
    own = random_units(groups, np.array([0.0, 1.0, 0.8]), np.random.default_rng(0))
    assert [part.sum() for part in np.split(own, [6, 14])] == [5, 1, 1]


def test_random_units_follow_the_seed():
    groups = grouped(TinyDetector()).groups
    seeds = map(np.random.default_rng, (1, 1, 2))
    one, two, other = (random_units(groups, 0.5, rng) for rng in seeds)
    assert (one == two).all()
    assert (one != other).any()


# -- verification --


@pytest.mark.parametrize('toy', TOYS)
@pytest.mark.parametrize('seed', [0, 1])
def test_right_groups_agree(toy, seed):
    net = toy()
    assert find_disagreements(net, grouped(net), toy_forward, seed) == []


@pytest.mark.parametrize('zeroed', [False, True])
def test_units_in_another_order_disagree(zeroed):
    net = ConvPair()
    if zeroed:  # a norm that starts at zero must not hide the difference
        torch.nn.init.zeros_(net.bn.weight)
    wrong = misplaced(grouped(net), 0, 'conv2.weight')
    (found,) = find_disagreements(net, wrong, toy_forward)
    assert found.group is wrong.groups[0]
    assert found.reason.startswith('outputs differ by')


@pytest.mark.parametrize('group', range(7))
def test_the_wrong_group_is_singled_out(group):
    net = TinyDetector()
    grouping = grouped(net)
    reader = next(m.name for m in grouping.groups[group].members if m.role == 'in')
    wrong = misplaced(grouping, group, reader)
    found = find_disagreements(net, wrong, toy_forward)
    assert [f.group for f in found] == [wrong.groups[group]]


def test_several_wrong_groups_are_singled_out():
    net = TinyDetector()
    wrong = misplaced(grouped(net), 1, 'stage2.weight')
    wrong = misplaced(wrong, 5, 'cls_pred.weight')
    found = find_disagreements(net, wrong, toy_forward)
    assert [f.group for f in found] == [wrong.groups[1], wrong.groups[5]]


class Blocks(nn.Module):
    """Blocks of two branches; one of the branches counts on its 6 channels."""

    def __init__(self):
        super().__init__()
        parts = {'a': conv(4, 6), 'b': conv(4, 5), 'c': conv(6, 4), 'd': conv(5, 4)}
        blocks = (nn.ModuleDict(copy.deepcopy(parts)) for _ in range(8))
        self.blocks = nn.ModuleList(blocks)
        self.stem, self.head = conv(3, 4), conv(4, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            y = block['a'](x).reshape(len(x), 6, *x.shape[2:])
            x = x + block['c'](y) + block['d'](block['b'](x))
        return self.head(x)


def test_groups_of_the_same_layers_fall_together(monkeypatch):
    trials = []

    def counted(*args):
        trials.append(args)
        return masked_and_compact(*args)

    monkeypatch.setattr('mmgfp.discovery.verify.masked_and_compact', counted)
    net = Blocks()
    grouping = grouped(net)
    assert len(grouping.groups) == 17  # the residual stream, and two of each block
    found = find_disagreements(net, grouping, toy_forward)
    assert {f.group.name for f in found} == {f'blocks.{i}.a' for i in range(8)}
    assert len(trials) <= 4 + 2 * 5  # all of them, halving once, and what is left


def fixed_width():
    """A head that counts on 6 channels of ``a``, beside a branch that does not."""

    def run(net, x):
        y = net.a(x).reshape(2, 6, 8, 8)
        return net.head(y) + net.last(net.b(x))

    return Net(run, a=conv(3, 6), head=conv(6, 4), b=conv(3, 5), last=conv(5, 4))


def test_an_error_of_the_compact_model_is_the_reason():
    net = fixed_width()
    (found,) = find_disagreements(net, grouped(net), toy_forward)
    assert found.group.name == 'a'
    assert found.reason.startswith('RuntimeError: shape')


def test_an_error_without_words_is_a_reason_too():
    def run(net, x):
        y = net.a(x)
        assert y.shape[1] == 6
        return net.head(y)

    net = Net(run, a=conv(3, 6), head=conv(6, 4))
    (found,) = find_disagreements(net, grouped(net), toy_forward)
    assert found.reason.startswith('AssertionError: ')


def test_groups_that_only_fail_together_are_all_doubted():
    """Widths may change, but only one of the two at a time."""

    def run(net, x):
        a, b = net.a(x), net.b(x)
        if a.shape[1] < 6 and b.shape[1] < 5:
            a = a * 2
        return net.head(a) + net.last(b)

    net = fixed_width()
    net.run = run
    found = find_disagreements(net, grouped(net), toy_forward)
    assert [f.group.name for f in found] == ['a', 'b']


def test_halves_that_stay_equal_by_chance_do_not_pass():
    """Equal shares of two coupled halves would hide that they need to be equal."""

    def run(net, x):
        y = torch.cat([net.a(x), net.b(x)], 1)
        first, second = torch.arange(y.shape[1]).chunk(2)
        return net.head(y[:, first]) + net.last(y[:, second])

    net = Net(run, a=conv(3, 8), b=conv(3, 8), head=conv(8, 4), last=conv(8, 4))
    grouping = grouped(net)
    equal = random_units(grouping.groups, 0.5, np.random.default_rng(0))
    assert disagreement(net, grouping.groups, equal, toy_forward) is None
    assert find_disagreements(net, grouping, toy_forward)


def test_random_ops_draw_alike():
    parts = dict(a=conv(3, 6), head=conv(6, 4))
    net = Net(lambda net, x: net.head(net.a(x) + torch.rand(2, 1, 8, 8)), **parts)
    assert find_disagreements(net, grouped(net), toy_forward) == []


def test_nothing_to_verify():
    assert find_disagreements(ConvPair(), Grouping((), (), {}), toy_forward) == []


def test_an_error_of_the_model_itself_is_raised():
    net = ConvPair()
    with pytest.raises(ZeroDivisionError):
        find_disagreements(net, grouped(net), lambda net: 1 / 0)


def test_verification_leaves_the_model_alone():
    net = ResidualPair()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    grouping, state = grouped(net), torch.get_rng_state()
    find_disagreements(net, grouping, toy_forward)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_masked_and_compact_are_copies():
    net = ConvPair()
    grouping = grouped(net)
    kept = np.array([True, False, True, True, True, True])
    masked, small = masked_and_compact(net, grouping.groups, kept)
    assert net.conv2.weight[:, 1].any()
    assert not masked.conv2.weight[:, 1].any()
    assert torch.equal(masked.conv2.weight[:, 2], net.conv2.weight[:, 2])
    assert small.conv2.weight.shape == (4, 5, 3, 3)


# -- what one lucky draw, huge values or evaluation mode would hide --


def padded(side, width=6, wider=6):
    """A shortcut padded to the branch's width, as read off both tensors."""

    def run(net, x):
        x = net.a(x)
        y = net.b(x)
        missing = y.shape[1] - x.shape[1]
        before = {'both': missing // 2, 'front': missing, 'back': 0}[side]
        pads = (0, 0, 0, 0, before, missing - before)
        return net.head((y + F.pad(x, pads)).relu())

    total = width + wider
    return Net(run, a=conv(3, width), b=conv(width, total), head=conv(total, 4))


def in_halves(net, x):
    x = net.a(x)
    half = x.shape[1] // 2
    return net.head(x[:, torch.arange(half)] * x[:, torch.arange(half) + half])


def in_pairs(net, x):
    x = net.a(x)
    pairs = x.reshape(len(x), x.shape[1] // 2, 2, *x.shape[2:])
    return net.head(pairs[:, :, 0] + pairs[:, :, 1].detach())


def beside_a_detached_mean(net, x):
    x = net.a(x)
    return net.b(x - x.detach().mean(1, keepdim=True))


def gated_by_detached_channels(net, x):
    x = net.a(x)
    return net.b(x * net.c(x).detach().sigmoid())


SIZED = {
    'pad on both sides': lambda: padded('both'),
    'pad in front': lambda: padded('front'),
    'pad behind': lambda: padded('back'),
    'halves': lambda: Net(in_halves, a=conv(3, 12), head=conv(6, 4)),
    'pairs': lambda: Net(in_pairs, a=conv(3, 12), head=conv(6, 4)),
    'detached mean': lambda: Net(beside_a_detached_mean, a=conv(3, 6), b=conv(6, 4)),
    'detached gate': lambda: Net(
        gated_by_detached_channels, a=conv(3, 6), b=conv(6, 4), c=conv(6, 6)
    ),
}


def verified(net, loss=None):
    """Groups of the net that are left when those that fail are frozen."""
    frozen = []
    while wrong := find_disagreements(
        net, grouping := grouped(net, frozen_groups=frozen), toy_forward, loss=toy_loss
    ):
        frozen += [(d.group, d.reason) for d in wrong]
    return grouping.groups


@pytest.mark.parametrize('wider', [2, 3, 4, 5, 16])
@pytest.mark.parametrize('seed', range(8))
def test_no_draw_lets_pads_on_both_sides_pass(wider, seed):
    """By one channel less the pads become unequal, or equal, at one of the ends."""
    torch.manual_seed(seed)
    net = padded('both', 8, wider)
    wrong = find_disagreements(net, grouped(net), toy_forward, seed)
    assert wider in [d.group.units for d in wrong if d.group.name == 'b']


@pytest.mark.parametrize('make', SIZED.values(), ids=SIZED)
@pytest.mark.parametrize('seed', range(4))
def test_any_units_of_verified_groups_can_go(make, seed):
    """Sizes that code reads off tensors fit to some sets of units, or to all."""
    torch.manual_seed(seed)
    net = make()
    groups = verified(net)
    rng = np.random.default_rng(seed)
    for _ in range(8):
        kept = random_units(groups, rng.uniform(0, 1, len(groups)), rng)
        assert disagreement(net, groups, kept, toy_forward) is None


@pytest.mark.parametrize('fill', [1e5, 1e9, 1e20, torch.finfo(torch.float64).max / 2])
@pytest.mark.parametrize('masked', [1, 50, 98])
def test_huge_values_hide_no_difference(fill, masked):
    a = torch.linspace(-1, 1, 100, dtype=torch.float64)
    a[:masked] = -fill
    b = a.clone()
    assert difference(a, a * (1 + 1e-9)) < TOLERANCE
    b[masked:] *= 1.1
    assert difference(a, b) > 10 * TOLERANCE


def test_zeros_and_what_rounding_leaves_of_them_are_equal():
    a = torch.tensor([0.0] * 50 + [1e-18] * 40 + [1.0, 2.0, 3.0], dtype=torch.float64)
    assert difference(a, a + 1e-15) < TOLERANCE
    assert difference(a, a + 1e-3) > TOLERANCE
    assert difference(torch.zeros(3), torch.full((3,), 1e-3)) > TOLERANCE


SCALES = {
    'layer scale': lambda: torch.full((6, 1, 1), 1e-6),
    'layer scale for images': lambda: torch.zeros(1, 6, 1, 1),
    'gate of a branch': lambda: torch.tensor(0.0),
    'kernel': lambda: torch.zeros(6, 1, 3, 3),
}


@pytest.mark.parametrize('make', SCALES.values(), ids=SCALES)
def test_branches_that_start_at_zero_hide_nothing(make):
    def run(net, x):
        y = net.b(net.a(x))
        if net.scale.numel() > 6:
            y = F.conv2d(y, net.scale, padding=1, groups=len(net.scale))
        else:
            y = y * net.scale
        return net.head(net.stem(x) + y)

    parts = {'stem': conv(3, 6), 'a': conv(3, 5), 'b': conv(5, 6), 'head': conv(6, 4)}
    net = Net(run, scale=nn.Parameter(make()), **parts)
    (group,) = [i for i, g in enumerate(grouped(net).groups) if g.name == 'a']
    wrong = misplaced(grouped(net), group, 'b.weight')
    assert [d.group.name for d in find_disagreements(net, wrong, toy_forward)] == ['a']


class Noisy(nn.Module):
    """Code in the middle of two layers that runs in training mode alone."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.drop = kind, nn.Dropout(0.5)
        self.a, self.b, self.c = conv(3, 6), conv(6, 5), conv(5, 4)
        self.register_buffer('wide', torch.linspace(0, 1, 6).reshape(1, 6, 1, 1))

    def forward(self, x):
        y = self.a(x)
        if self.training and self.kind == 'buffer':
            y = y + self.wide
        elif self.training and self.kind == 'mean':
            y = y - y.detach().mean(1, keepdim=True)
        elif self.training and self.kind == 'width':
            y = y * y.shape[1]
        elif self.kind == 'dropout':
            y = self.drop(y)
        elif self.kind == 'functional dropout':
            y = F.dropout(y, 0.5, self.training)
        elif self.kind == 'noise':
            y = y + torch.randn_like(y) * self.training
        return self.c(self.b(y.relu()).relu())


@pytest.mark.parametrize(
    ('kind', 'reason'),
    [
        ('buffer', 'in training mode, RuntimeError: The size of tensor'),
        ('mean', 'training losses differ'),
        ('width', 'training losses differ'),
        ('dropout', None),
        ('functional dropout', None),
        ('noise', None),
    ],
)
def test_code_of_training_mode_is_verified(kind, reason):
    net = Noisy(kind)
    grouping = grouped(net, lambda net: square_loss(net.eval()(images())))
    wrong = find_disagreements(net.train(), grouping, toy_forward, loss=toy_loss)
    assert [d.group.name for d in wrong] == (['a'] if reason else [])
    assert all(d.reason.startswith(reason) for d in wrong)
    assert find_disagreements(net, grouping, toy_forward) == []
    assert find_disagreements(net.eval(), grouping, toy_forward, loss=toy_loss) == []


def test_a_loss_that_cannot_be_computed_in_double_precision_has_to_run():
    def counted(net):
        value = net(images()).mean()
        assert value.dtype == torch.float32
        assert not net.kind or net.a.out_channels == 6
        return value

    for kind in ('', 'counts'):
        net = Noisy(kind)
        wrong = find_disagreements(net, grouped(net), toy_forward, loss=counted)
        assert [d.group.name for d in wrong] == (['a'] if kind else [])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_models_of_one_precision_are_verified_in_it(dtype):
    def of_its_own(net):
        assert next(net.parameters()).dtype == dtype
        return net(images().to(dtype))

    assert find_disagreements(ConvPair(), grouped(ConvPair()), of_its_own) == []
    net = fixed_width()
    wrong = find_disagreements(net, grouped(net), of_its_own)
    assert [d.group.name for d in wrong] == ['a']


class Centred(nn.Module):
    """Adds the mean of all channels to each, which a pruned channel changes.

    Args:
        ending: What turns its output into that of the net.
    """

    def __init__(self, ending):
        super().__init__()
        self.a, self.b, self.ending = conv(3, 6), conv(6, 4), ending

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y + y.detach().mean(1, keepdim=True))
        return self.ending(F.dropout(y, 0.1, self.training))


def single_only(x):
    if x.dtype == torch.float64:
        raise TypeError('single precision only')
    return x


@pytest.mark.parametrize(
    'ending',
    [
        lambda x: 1 - torch.sigmoid(x + 30),  # 0 in single precision
        lambda x: -torch.log(torch.sigmoid(x + 20)),
        lambda x: (x + 1e9) - 1e9,
        lambda x: (x.clamp(min=0) * 1e-3).half() * 1e-5,
        single_only,
    ],
    ids=['saturated', 'log', 'offset', 'half', 'single only'],
)
def test_what_single_precision_hides_or_double_refuses_is_found(ending):
    """The loss is random, so that it tells nothing."""
    torch.manual_seed(0)
    net = Centred(ending)
    grouping = grouped(Centred(nn.Identity()))
    wrong = find_disagreements(net, grouping, toy_forward, loss=toy_loss)
    assert [d.group.name for d in wrong] == ['a']
    assert wrong[0].reason.startswith('outputs differ by')


def test_models_in_double_precision_keep_values_that_single_lacks():
    net = ConvPair()
    net.register_buffer('eps', torch.tensor(1e-60, dtype=torch.float64))

    def forward(net):
        return torch.log(F.relu(toy_forward(net)).double() + net.eps)

    assert find_disagreements(net, grouped(ConvPair()), forward) == []


def test_differences_of_half_precision_do_not_vanish():
    zero = torch.zeros(2, dtype=torch.half)
    assert difference(zero, zero + torch.tensor([0.0, 1.0]).half()) > TOLERANCE


def test_a_loss_that_cannot_be_computed_is_no_fault_of_the_groups():
    net = ConvPair()
    assert (
        find_disagreements(net, grouped(net), toy_forward, loss=lambda net: 1 / 0) == []
    )


@pytest.mark.parametrize(
    'error',
    [
        torch.cuda.OutOfMemoryError('CUDA out of memory.'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError('DefaultCPUAllocator: not enough memory'),
        MemoryError(),
    ],
    ids=str,
)
@pytest.mark.parametrize('training', [False, True])
def test_running_out_of_memory_is_no_disagreement(error, training):
    def starved(net):
        if net.conv1.out_channels < 6 and net.training == training:
            raise error
        return toy_loss(net)

    net = ConvPair()
    with pytest.raises(type(error)):
        find_disagreements(net, grouped(net), starved, loss=starved)


# -- in the pruner --


def test_a_group_that_fails_is_frozen_and_reported(caplog):
    pruner = GroupFisherPruner(fixed_width(), target=dict(flops=0.9))
    with caplog.at_level(logging.WARNING, 'mmgfp'):
        grouping = pruner.prepare(toy_loss, toy_forward, 2)
    assert [g.name for g in grouping.groups] == ['b']
    assert reasons_of(grouping)['a'].startswith(
        'masked and compact disagree: RuntimeError'
    )
    assert 'group a is left alone' in caplog.text
    assert 'members: a.weight[0], a.bias[0], head.weight[1]' in caplog.text


def test_a_group_that_fails_is_an_error_under_strict():
    pruner = GroupFisherPruner(fixed_width(), strict=True)
    words = r'groups a must have equal outputs in the masked and the compact model'
    with pytest.raises(TraceError, match=words):
        pruner.prepare(toy_loss, toy_forward, 2)


def test_groups_that_share_a_layer_with_a_failed_one_stay(monkeypatch):
    """Freezing a group freezes its units, not all of its layers."""
    answers = [lambda groups: [Disagreement(groups[1], 'no')], lambda groups: []]
    monkeypatch.setattr(
        'mmgfp.discovery.discover.find_disagreements',
        lambda model, grouping, forward, loss: answers.pop(0)(grouping.groups),
    )
    grouping = GroupFisherPruner(SharedHead()).prepare(toy_loss, toy_forward, 2)
    assert [g.name for g in grouping.groups] == ['stem', 'tower']


def test_verification_is_repeated_until_it_holds(monkeypatch):
    answers = [1, 1, None]

    def find(model, grouping, forward, loss):
        wrong = answers.pop(0)
        return [] if wrong is None else [Disagreement(grouping.groups[wrong], 'no')]

    monkeypatch.setattr('mmgfp.discovery.discover.find_disagreements', find)
    grouping = (
        GroupFisherPruner(SharedHead(), target=dict(flops=0.9))
        .discover(toy_loss, toy_forward, 2)
        .grouping
    )
    assert [g.name for g in grouping.groups] == ['stem']
    assert answers == []


class DeadLayer(nn.Module):
    """Pads to the middle what ReLU zeroes on any batch, by sizes read off tensors."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 8, 1), relu
        self.wide, self.head = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)
        self.low = nn.Parameter(torch.full((1, 8, 1, 1), -100.0))

    def forward(self, x):
        x = self.relu(self.first(x) + self.low)
        y = self.wide(x)
        missing = y.shape[1] - x.shape[1]
        pads = missing // 2, missing - missing // 2
        return self.head(y + F.pad(x, (0, 0, 0, 0, *pads)))


@pytest.mark.parametrize('relu', [nn.ReLU(), nn.ReLU(inplace=True), F.relu, nn.ReLU6()])
def test_layers_that_are_dead_on_the_batch_hide_nothing(relu):
    model = DeadLayer(relu)
    assert not relu(model.first(images()) + model.low).any()
    pruner = GroupFisherPruner(model)
    grouping = pruner.prepare(lambda m: m(images()).square().sum(), toy_forward, 2)
    [wide] = [layer for layer in grouping.frozen if layer.layer == 'wide']
    assert 'masked and compact disagree' in wide.reason and wide.channels == 8


class CountsOnZeros(nn.Module):
    """Two layers, and code that only holds for what a true ReLU gives."""

    def __init__(self, code):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(*w, 1) for w in ((3, 16), (16, 8), (8, 4)))
        self.code = code

    def forward(self, x):
        return self.code(self, F.relu(self.b(F.relu(self.a(x)))))


def halves_until_zero(net, y):
    y = net.c(y)
    while F.relu(y.abs() - 0.01).any():
        y = y * 0.5
    return y


def asserts(net, y):
    assert (y >= 0).all()
    return net.c(y)


def counts(net, y):
    return net.c(y) * ((y == 0).sum(1, keepdim=True) < 6)


def branches(net, y):
    mean = 0 if y.min() < 0 else y.detach().mean(1, keepdim=True)
    return net.c(y - mean)


@pytest.mark.parametrize(
    ('code', 'layers'),
    [
        (lambda net, y: net.c((y + 1e-6).sqrt()), {'a', 'b'}),
        (lambda net, y: net.c(y) + 0 * torch.poisson(y.detach()).sum(), {'a', 'b'}),
        (lambda net, y: net.c(y[:, :, F.relu(torch.arange(8))]), {'a', 'b'}),
        (asserts, {'a', 'b'}),
        (counts, {'a'}),
        (branches, {'a'}),
    ],
)
def test_code_that_counts_on_relu_is_compared_with_it(code, layers):
    torch.manual_seed(0)
    pruner = GroupFisherPruner(CountsOnZeros(code), target=dict(flops=0.9))
    grouping = pruner.prepare(lambda m: m(images()).square().sum(), toy_forward, 2)
    assert {n for g in grouping.groups for n in g.layers('out')} == layers


def test_loops_that_wait_for_zeros_end():
    pruner = GroupFisherPruner(CountsOnZeros(halves_until_zero))
    grouping = pruner.prepare(lambda m: m(images()).square().sum(), toy_forward, 2)
    assert {n for g in grouping.groups for n in g.layers('out')} == {'a', 'b'}
