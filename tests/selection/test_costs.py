"""Costs worked out by hand, and against what compact models really do."""

import numpy as np
import pytest
import torch
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
    toy_loss,
)
from torch import nn

from mmgfp.discovery.profile import profile_layers
from mmgfp.discovery.verify import random_units
from mmgfp.selection.costs import CostTable, RunningCosts


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


def test_flops_is_another_word_for_macs():
    totals = costs_of(nn.Sequential(nn.Linear(5, 3)), lambda m: m(torch.zeros(1, 5)))
    totals = totals.totals(np.zeros(0))
    assert totals['flops'] == totals['macs'] == 15


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('toy', [*TOYS, Loop])
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
