"""Costs worked out by hand, and against what compact models really do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.pruning import prepared
from support.toys import (
    TOYS,
    ConvPair,
    DepthWise,
    FlattenLinear,
    GroupConv,
    GroupTransposed,
    SharedHead,
    Transposed,
    conv,
    images,
    toy_loss,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmgfp import GroupFisherPruner
from mmgfp.discovery.profile import profile_layers
from mmgfp.discovery.unit_sets import random_units
from mmgfp.selection.costs import CostTable, LayerProfile, RunningCosts
from mmgfp.utils.errors import ConfigError


def costs_of(model, forward, count=1, groups=()):
    shapes = {n: p.shape for n, p in model.named_parameters()}
    return CostTable(shapes, profile_layers(model, forward, count), groups)


COSTS = ('macs', 'memory', 'params')


def values(totals):
    return [totals[cost] for cost in COSTS]


def savings_of(pruner, removed, step=None):
    """What the next units of each group save, three arrays (G,)."""
    running = RunningCosts(pruner.units.costs, removed, step)
    return [running.savings(cost) for cost in COSTS]


def one_unit(toy, group, gone=0):
    """What one more unit of the group called ``group`` saves after ``gone`` units."""
    pruner = prepared(toy())
    names = [g.name for g in pruner.units.grouping.groups]
    removed = np.zeros(len(names))
    removed[names.index(group)] = gone
    return [v[names.index(group)] for v in savings_of(pruner, removed)]


@pytest.mark.parametrize(
    ('layer', 'shape', 'macs', 'memory', 'params'),
    [
        # weight elements · output positions, channels · positions, elements + biases
        (conv(3, 4, stride=2), (3, 8, 8), 108 * 16, 4 * 16, 108 + 4),
        (conv(8, 12, groups=4), (8, 8, 8), 12 * 2 * 9 * 64, 12 * 64, 216 + 12),
        (conv(6, 6, groups=6), (6, 8, 8), 54 * 64, 6 * 64, 54 + 6),
        (nn.Conv1d(3, 4, 3), (3, 10), 36 * 8, 4 * 8, 36 + 4),
        # weight elements · input positions
        (nn.ConvTranspose2d(5, 6, 2, 2), (5, 4, 4), 120 * 16, 6 * 64, 120 + 6),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (4, 4, 4), 48 * 16, 384, 48 + 6),
        (nn.Linear(5, 3), (5,), 15, 3, 18),
        (nn.Linear(5, 3, bias=False), (7, 5), 15 * 7, 3 * 7, 15),
    ],
)
def test_layers_by_hand(layer, shape, macs, memory, params):
    for count in (1, 3):  # costs are for one image
        x = torch.zeros(count, *shape)
        model = nn.Sequential(layer)
        table = costs_of(model, lambda m, x=x: m(x), count)
        assert values(table.totals(np.zeros(0))) == [macs, memory, params]


def test_shared_head_works_on_every_level():
    head = nn.Sequential(conv(2, 3, 1))

    def forward(head):
        return head(torch.zeros(1, 2, 4, 4)), head(torch.zeros(1, 2, 2, 2))

    # 6 weights on 16 + 4 positions; parameters once
    assert values(costs_of(head, forward).totals(np.zeros(0))) == [120, 60, 9]


def test_layer_that_does_not_run_costs_parameters_only():
    model = nn.ModuleList([conv(2, 3, 1), conv(2, 3, 1)])
    table = costs_of(model, lambda m: m[0](torch.zeros(1, 2, 4, 4)))
    assert values(table.totals(np.zeros(0))) == [96, 48, 18]


@pytest.mark.parametrize('gone', [0, 2])
@pytest.mark.parametrize(
    ('toy', 'group', 'saved'),
    [
        # conv1: 3·9 weights, bn: 2, conv2: 4·9 weights, all on 64 positions
        (ConvPair, 'conv1', [(27 + 36) * 64, 64, 27 + 2 + 36]),
        # expand: 3 + bias, dw: 9, bn: 2, project: 4; two layers make the channel
        (DepthWise, 'expand', [(3 + 9 + 4) * 64, 128, 4 + 9 + 2 + 4]),
        # stem: 2·27 + 2, mid: 3·2·9 + 3, head: 3·4·9
        (GroupConv, 'stem', [(54 + 54 + 108) * 64, 5 * 64, 56 + 57 + 108]),
        # level1: 6 + 1 on 64, level2: 54 + 1 on 16, tower: 5·9 on 64 + 16 positions
        (SharedHead, 'level1', [6 * 64 + 54 * 16 + 45 * 80, 80, 7 + 55 + 45]),
        # stem: 27 + 1, up: 6·4 on 64 inputs each; up makes 16·16 outputs
        (Transposed, 'stem', [(27 + 24) * 64, 64, 28 + 24]),
        # up: 5·4 on 64 inputs, head: 4·9 on 256
        (Transposed, 'up', [20 * 64 + 36 * 256, 256, 20 + 1 + 36]),
        # stem: 2·27 + 2, up: 2·4·4 + 4 on 64 inputs, head: 4·4·9 on 256
        (
            GroupTransposed,
            'stem',
            [(54 + 32) * 64 + 144 * 256, 2 * 64 + 4 * 256, 56 + 36 + 144],
        ),
        # conv: 27 + 1 on 64, fc1: 4 inputs for each of 5 outputs
        (FlattenLinear, 'conv', [27 * 64 + 20, 64, 28 + 20]),
    ],
)
def test_savings_of_one_unit_by_hand(toy, group, saved, gone):
    assert one_unit(toy, group, gone) == saved


class Loop(nn.Module):
    """mid reads and makes the channels of one group."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = conv(3, 6, 1, bias=False), conv(6, 6, 1, bias=False)
        self.head = conv(6, 4, 1, bias=False)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.mid(x))


def test_savings_of_a_layer_inside_one_group():
    # mid shrinks from 6·6 to 5·5 (11 weights), and from 4·4 to 3·3 (7 weights)
    assert one_unit(Loop, 'stem') == [(3 + 11 + 4) * 64, 128, 3 + 11 + 4]
    assert one_unit(Loop, 'stem', 2) == [(3 + 7 + 4) * 64, 128, 3 + 7 + 4]


def test_savings_depend_on_what_the_neighbours_have_left():
    # level1 keeps reading the 6 - 2 channels of stem that are left
    macs, *_ = savings_of(prepared(SharedHead()), np.array([2, 0, 0]))
    assert macs[1] == 4 * 64 + 36 * 16 + 45 * 80


class Tied(nn.Module):
    """Two layers with one weight, on 64 and on 16 positions, and a view of a third."""

    def __init__(self):
        super().__init__()
        self.small, self.large = conv(4, 4, 1), conv(4, 4, 1)
        self.large.weight = self.small.weight
        self.both = nn.Linear(4, 6)

    def forward(self, x):
        x = self.large(self.small(F.max_pool2d(self.small(x), 2))).mean((2, 3))
        return F.linear(x, self.both.weight[:2]) + x @ self.both.weight[2:4].t()


class Own(nn.Module):
    """A convolution or a matrix (in, out) with a factor on its weight."""

    def __init__(self, *shape, gain=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        if gain:
            self.gain = nn.Parameter(torch.rand(shape[0], 1, 1, 1) + 0.5)
        self.register_buffer('factor', torch.tensor([0.1]))

    def forward(self, x):
        weight = self.weight * getattr(self, 'gain', self.factor)
        if weight.dim() == 2:
            return x @ weight
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class OwnLayers(nn.Module):
    """Layers that are none of torch's."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Own(6, 3, 3, 3, gain=True), Own(8, 6, 1, 1)
        self.third, self.head = Own(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        return self.head(self.third(x).relu())


class Heads(nn.Module):
    """One matrix for each of two heads; a vector as input."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, 3, 5))
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        y = torch.einsum('nhd,hde->nhe', x[:, :, 0, 0].reshape(-1, 2, 3), self.heads)
        return self.last(y[0, 0])


class Attention(nn.Module):
    """Learned queries look at positions, 4 heads of a packed projection."""

    def __init__(self, packed=True):
        super().__init__()
        self.queries = nn.Embedding(5, 8)
        width = None if packed else 8
        options = dict(batch_first=True, kdim=width, vdim=width)
        self.attention = nn.MultiheadAttention(8, 4, **options)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (N, 64, 8)
        queries = self.queries.weight.expand(len(x), 5, 8)
        return self.attention(queries, x, x, need_weights=False)[0]


def normed():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(conv(4, 5, 1)),
        nn.utils.parametrizations.spectral_norm(conv(5, 6, 1)),
    )


@pytest.mark.parametrize(
    ('model', 'channels', 'macs', 'memory'),
    [
        # small on 64 + 16 positions and large on 16; two halves of both's first rows
        (Tied, 4, 16 * 96 + 2 * 8, 4 * 96 + 2 * 2),
        (OwnLayers, 3, (162 + 48) * 64 + 64 + 16, (6 + 8) * 64 + 8 + 2),
        # two images give two rows, the vector is one row for both
        (Heads, 6, 30 + 10, 10 + 2),
        # queries on 5 rows, keys and values on 64 each, out on 5
        *(
            (toy, 8, 64 * (5 + 64 + 64 + 5), 8 * (5 + 64 + 64 + 5))
            for toy in (Attention, lambda: Attention(packed=False))
        ),
        (normed, 4, (20 + 30) * 64, 11 * 64),
        # gates: 4·5 rows that read 64 inputs and 5 states, for 8 steps
        (lambda: nn.Sequential(nn.Flatten(2), nn.LSTM(64, 5)), 8, 20 * 69 * 8, 320),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_what_runs_counts_whoever_calls_it(model, channels, macs, memory, training):
    x, model = torch.rand(2, channels, 8, 8), model().train(training)
    totals = costs_of(model, lambda m: m(x), 2).totals(np.zeros(0))
    assert (totals['macs'], totals['memory']) == (macs, memory)


@pytest.mark.parametrize('toy', [*TOYS, Loop, Tied, OwnLayers, normed])
def test_macs_are_those_of_the_flop_counter(toy):
    model, x = toy(), images()
    if toy in (Tied, normed):
        x = torch.rand(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    totals = costs_of(model, lambda m: m(x), 2).totals(np.zeros(0))
    assert totals['macs'] * 2 * 2 == counter.get_total_flops()


@pytest.mark.parametrize('shape', [(3, 6), (3, 7, 6)])
def test_rows_count_for_own_layers_too(shape):
    """Rows of a part that works on RoIs count as declared, however many come."""
    head = nn.ModuleDict(dict(roi=nn.Sequential(Own(6, 4), nn.Linear(4, 2))))
    profiles = profile_layers(head, lambda m: m.roi(torch.ones(shape)), 2, {'roi': 512})
    positions = 512 * (shape[1] if len(shape) > 2 else 1)
    for name in ('roi.0.weight', 'roi.1.weight'):
        assert profiles[name].macs_positions == pytest.approx(positions, rel=1e-12)


def test_products_of_activations_are_mentioned(caplog):
    model, x = Attention(), torch.rand(2, 8, 8, 8)
    costs_of(model, lambda m: m(x), 2)
    # scores and their use: 5·64 pairs of 8 channels, twice; 138·64 of weights
    assert '5.12e+03 of 1.4e+04 multiply-accumulates multiply no param' in caplog.text


@pytest.mark.parametrize('cost', ['flops', 'memory'])
def test_a_cost_of_zero_is_no_target(cost):
    pruner = GroupFisherPruner(ConvPair(), target={cost: 0.5})
    words = rf'target\.{cost} must be of a cost that the model has \(got 0\.5 of 0\)'
    with pytest.raises(ConfigError, match=words):
        pruner.prepare(toy_loss, toy_loss, 2, {'conv1.weight': LayerProfile(0, 0)})


def test_flops_is_another_word_for_macs():
    totals = costs_of(nn.Sequential(nn.Linear(5, 3)), lambda m: m(torch.zeros(1, 5)))
    totals = totals.totals(np.zeros(0))
    assert totals['flops'] == totals['macs'] == 15


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('toy', [*TOYS, Loop, OwnLayers])
def test_arithmetic_equals_measurement(toy, seed):
    """Totals without random units are those of the compact model."""
    pruner, rng = prepared(toy()), np.random.default_rng(seed)
    groups, share = pruner.units.grouping.groups, rng.uniform(0.1, 0.9)
    pruner.units.kept = random_units(groups, share, rng)
    assert pruner.units.removed.sum() > 0
    measured = costs_of(pruner.compact(), toy_loss, 2).totals(np.zeros(0))
    assert values(pruner.units.totals) == values(measured)


def test_savings_are_differences_of_totals():
    pruner, removed = prepared(SharedHead()), np.array([1, 3, 2])
    savings = savings_of(pruner, removed)
    now = values(pruner.units.costs.totals(removed))
    for g in range(3):
        then = values(pruner.units.costs.totals(removed + np.eye(3, dtype=int)[g]))
        saved = [of_groups[g] for of_groups in savings]
        assert [n - t for n, t in zip(now, then, strict=True)] == saved


@pytest.mark.parametrize('toy', [*TOYS, Loop])
def test_costs_that_follow_are_those_worked_out_anew(toy):
    pruner, rng = prepared(toy()), np.random.default_rng(0)
    sizes = [g.units for g in pruner.units.grouping.groups]
    removed, more = np.zeros(len(sizes), dtype=int), np.ones(len(sizes))
    running = RunningCosts(pruner.units.costs, removed)
    for _ in range(6):
        g = int(rng.integers(len(sizes)))
        units = min(int(rng.integers(1, 3)), sizes[g] - removed[g])
        removed[g] += units
        more[g] = min(int(rng.integers(1, 3)), sizes[g] - removed[g])
        running.remove(g, units, more[g])
        assert values(running.totals) == values(pruner.units.costs.totals(removed))
        for cost, then in zip(COSTS, savings_of(pruner, removed, more), strict=True):
            assert running.savings(cost).tolist() == then.tolist()


def test_savings_of_two_units_at_once():
    macs, *_ = savings_of(prepared(Loop()), np.zeros(1), np.array([2]))
    # stem 2·3, mid from 6·6 to 4·4, head 2·4, on 64 positions each
    assert macs.tolist() == [(6 + 20 + 8) * 64]
