"""Greedy selection, worked out by hand on a chain of three layers.

a makes the units of group A, b reads them and makes those of group B, c reads these.
All kernels are 1 x 1, so MACs are channels in · channels out · positions.
"""

import numpy as np
import pytest

from mmgfp.costs import CostTable, LayerWork
from mmgfp.errors import ConfigError
from mmgfp.groups import ChannelGroup, Member
from mmgfp.selection import Limits, Target, select_units

NONE_LEAST = Limits(np.array([0, 0]))


def chain(width=2, positions=(10, 1, 1)):
    """A chain from 1 channel over ``width`` and ``width`` to 1 channel."""
    shapes = {
        'a.weight': (width, 1),
        'b.weight': (width, width),
        'c.weight': (1, width),
    }
    work = {n: LayerWork(p, p) for n, p in zip(shapes, positions, strict=True)}
    index = np.arange(width)[:, None]
    groups = [
        ChannelGroup(
            maker,
            (
                Member(f'{maker}.weight', 0, index, 'out'),
                Member(f'{reader}.weight', 1, index, 'in'),
            ),
        )
        for maker, reader in ('ab', 'bc')
    ]
    return CostTable(shapes, work, groups)


def pick(importance, costs=None, count=99, alive=None, done=None, **options):
    """Numbers of the picked units; the first half is of group A, the rest of B."""
    importance = np.array(importance, dtype=float)
    half = len(importance) // 2
    units = select_units(
        importance,
        np.repeat([0, 1], half),
        np.ones(2 * half, dtype=bool) if alive is None else np.array(alive),
        costs or chain(half),
        options.get('limits', NONE_LEAST),
        options.get('normalize', 'none'),
        count,
        done or (lambda now: False),
    )
    return units.tolist()


# -- the greedy order ---------------------------------------------------------


def test_order_without_normalisation():
    assert pick([5, 30, 1, 4]) == [2, 3, 0, 1]


def test_order_by_memory():
    # a puts out 10 elements a channel, b 1: 0.5 and 3 in A, 1 and 4 in B
    assert pick([5, 30, 1, 4], normalize='memory') == [0, 2, 1, 3]


def test_order_by_flops():
    # A saves 10 in a and 1 in b for each unit of B: 12; B 1 for each unit of A and 1
    # in c: 3. 5/12 > 1/3: unit 2. Then A saves 11: 5/11 < 4/3: unit 0. Then B saves 2:
    # 30/11 > 4/2: unit 3, and unit 1 is left.
    assert pick([5, 30, 1, 4], normalize='flops') == [2, 0, 3, 1]


def test_costs_are_those_that_earlier_picks_leave():
    # Both groups save 2·10 + 1 = 21 at first: unit 0 is least. Without it B saves
    # 1·10 + 1 = 11 only: 25/11 > 30/21, though 25/21 < 30/21.
    costs = chain(positions=(1, 10, 1))
    importance = [1, 30, 25, 99]
    assert pick(importance, costs, 2, normalize='flops') == [0, 1]
    assert pick(importance, costs, 2, normalize='none') == [0, 2]


def test_earlier_steps_count_as_well():
    costs = chain(positions=(1, 10, 1))
    alive = [False, True, True, True]
    assert pick([0, 30, 25, 99], costs, 1, alive, normalize='flops') == [1]
    assert pick([0, 30, 25, 99], costs, 1, normalize='flops') == [0]


def test_scale_of_the_importance_changes_nothing():
    importance = np.random.default_rng(0).random(40)
    picked = pick(importance, normalize='flops')
    assert pick(importance * 65536.0**2, normalize='flops') == picked
    assert len(picked) == 40


def test_ties_go_to_the_lowest_number():
    assert pick([1, 1, 1, 1]) == [0, 1, 2, 3]
    assert pick([0, 0, 0, 0], normalize='flops') == [0, 1, 2, 3]


def test_slow_greedy_search_agrees():
    """All units are scored anew for each pick."""
    rng = np.random.default_rng(0)
    costs, group_of = chain(20, (3, 5, 7)), np.repeat([0, 1], 20)
    importance, removed, expected = rng.random(40), np.zeros(2), []
    left = np.ones(40, dtype=bool)
    for _ in range(30):
        scores = importance / costs.savings(removed).macs[group_of]
        unit = int(np.where(left, scores, np.inf).argmin())
        expected.append(unit)
        left[unit] = False
        removed[group_of[unit]] += 1
    assert pick(importance, costs, 30, normalize='flops') == expected


# -- what is never picked -----------------------------------------------------


def test_unknown_importance_is_never_picked():
    assert pick([np.nan, 2, np.nan, 1]) == [3, 1]
    assert pick([np.nan] * 4) == []


def test_infinite_importance_is_never_picked():
    assert pick([np.inf, 2, 1, np.inf]) == [2, 1]


def test_pruned_units_are_never_picked():
    assert pick([1, 2, 3, 4], alive=[False, True, True, False]) == [1, 2]


def test_input_arrays_are_left_alone():
    importance, alive = np.array([1.0, 2, 3, 4]), np.ones(4, dtype=bool)
    limits = Limits(np.array([0, 0]))
    select_units(
        importance,
        np.repeat([0, 1], 2),
        alive,
        chain(),
        limits,
        'flops',
        9,
        lambda _: 0,
    )
    assert alive.all()
    assert importance.tolist() == [1, 2, 3, 4]
    assert limits.least.tolist() == [0, 0]


# -- when it stops ------------------------------------------------------------


def test_limits_close_a_group():
    limits = Limits(np.array([1, 2]))
    assert pick([5, 6, 1, 2], limits=limits) == [0]
    # one unit of A went earlier
    assert pick([5, 6, 1, 2], limits=limits, alive=[False, True, True, True]) == []


def test_count_is_a_bound():
    assert pick([5, 30, 1, 4], count=3) == [2, 3, 0]


def test_stops_exactly_at_the_target():
    # memory: 2·10 + 2·1 + 1 = 23; without unit 2: 22, without 3: 21, without 0: 11
    def reached(memory):
        return pick([5, 30, 1, 4], done=lambda now: now.memory <= memory)

    assert reached(23) == []
    assert reached(22) == [2]
    assert reached(21) == [2, 3]
    assert reached(20) == [2, 3, 0]


def test_several_targets_stop_at_the_first():
    costs = chain()
    full = costs.totals(np.zeros(2))  # 26 MACs, 23 elements
    targets = [Target('flops', 0.85), Target('memory', 0.96)]
    picked = pick(
        [5, 30, 1, 4], done=lambda now: any(t.reached(now, full) for t in targets)
    )
    assert picked == [2]  # 22 / 23 elements < 0.96, while 23 / 26 MACs > 0.85


def test_work_per_pick_does_not_grow_with_the_units(monkeypatch):
    """Costs are worked out once per pick, and never unit by unit."""
    costs = chain(10_000)
    calls = []
    savings = CostTable.savings
    monkeypatch.setattr(
        CostTable, 'savings', lambda *args: calls.append(0) or savings(*args)
    )
    importance = np.random.default_rng(0).random(20_000)
    picked = pick(importance, costs, 3000)
    assert picked == np.argsort(importance)[:3000].tolist()
    assert len(calls) <= 3000


# -- limits and targets -------------------------------------------------------


def test_limits_of_groups():
    units, no_minimum = np.array([10, 7, 1]), np.array([1, 1, 1])
    assert Limits.of(units, no_minimum, 1.0).least.tolist() == [1, 1, 1]
    assert Limits.of(units, no_minimum, 0.5).least.tolist() == [5, 4, 1]
    assert Limits.of(units, no_minimum, 0.7).least.tolist() == [3, 3, 1]
    # a group that is smaller than its minimum is closed
    assert Limits.of(units, np.array([8, 8, 8]), 0.5).least.tolist() == [8, 7, 1]


def test_target_labels_are_file_names():
    assert Target.parse({'flops': 0.5}).label == 'flops50'
    assert Target.parse({'memory': 0.125}).label == 'memory12_5'


@pytest.mark.parametrize(
    ('raw', 'words'),
    [
        ({'flops': 1.0}, r'target.flops: expected a ratio between 0 and 1, got 1\.0; '),
        ({'flops': 0}, 'target.flops: expected a ratio between 0 and 1, got 0; '),
        (
            {'params': '0.5'},
            "target.params: expected a ratio .*, got '0.5'; give",
        ),
        ({'latency': 0.5}, r'target: expected a dict with one cost, got .*latency.*; '),
        ({'flops': 0.5, 'memory': 0.5}, 'target: expected a dict with one cost'),
        (
            {},
            'target: expected a dict with one cost, got {}; give one of flops',
        ),
        (0.5, r'got 0.5; give one of .*, such as dict\(flops=0.5\)'),
    ],
)
def test_bad_targets_are_refused(raw, words):
    with pytest.raises(ConfigError, match=words):
        Target.parse(raw)
