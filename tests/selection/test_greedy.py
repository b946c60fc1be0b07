"""Greedy selection, worked out by hand on a chain of three layers.

a makes the units of group A, b reads them and makes those of group B, c reads these.
All kernels are 1 x 1, so MACs are channels in · channels out · positions.
"""

import numpy as np
import pytest

from mmgfp.groups import ChannelGroup, Member, ResidualBlock
from mmgfp.selection.costs import CostTable, LayerProfile, RunningCosts
from mmgfp.selection.greedy import Limits, select_units
from mmgfp.selection.targets import Target


def limits(least=(0, 0), steps=(1, 1)):
    return Limits(np.array(least), np.array(steps))


def chain(width=2, positions=(10, 1, 1)):
    """A chain from 1 channel over ``width`` and ``width`` to 1 channel."""
    shapes = {'a.weight': (width, 1), 'b.weight': (width,) * 2, 'c.weight': (1, width)}
    profiles = {n: LayerProfile(p, p) for n, p in zip(shapes, positions, strict=True)}
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
    return CostTable(shapes, profiles, groups)


def pick(
    importance,
    costs=None,
    count=99,
    kept=None,
    done=None,
    normalize='none',
    bound=np.inf,
    **options,
):
    """Numbers of the picked units; the first half is of group A, the rest of B."""
    importance = np.array(importance, dtype=float)
    half = len(importance) // 2
    units = select_units(
        importance,
        np.repeat([0, 1], half),
        np.ones(2 * half, dtype=bool) if kept is None else np.array(kept),
        costs or chain(half),
        limits(**options),
        normalize,
        done or (lambda now: False),
        count,
        bound,
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
    kept = [False, True, True, True]
    assert pick([0, 30, 25, 99], costs, 1, kept, normalize='flops') == [1]
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
        scores = importance / RunningCosts(costs, removed).savings('flops')[group_of]
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
    assert pick([1, 2, 3, 4], kept=[False, True, True, False]) == [1, 2]


def test_input_arrays_are_left_alone():
    importance, kept = np.array([1.0, 2, 3, 4]), np.ones(4, dtype=bool)
    bounds, group_of = limits(), np.repeat([0, 1], 2)
    rest = (chain(), bounds, 'flops', lambda now: False)
    select_units(importance, group_of, kept, *rest)
    assert kept.all()
    assert importance.tolist() == [1, 2, 3, 4]
    assert bounds.least.tolist() == [0, 0]


# -- when it stops ------------------------------------------------------------


def test_limits_close_a_group():
    assert pick([5, 6, 1, 2], least=[1, 2]) == [0]
    # one unit of A went earlier
    assert pick([5, 6, 1, 2], least=[1, 2], kept=[False, True, True, True]) == []


def test_count_is_a_bound():
    assert pick([5, 30, 1, 4], count=3) == [2, 3, 0]


def test_stops_exactly_at_the_target():
    # memory: 2·10 + 2·1 + 1 = 23; without unit 2: 22, without 3: 21, without 0: 11
    def reached(memory):
        return pick([5, 30, 1, 4], done=lambda now: now['memory'] <= memory)

    assert reached(23) == []
    assert reached(22) == [2]
    assert reached(21) == [2, 3]
    assert reached(20) == [2, 3, 0]


def test_several_targets_stop_at_the_first():
    costs = chain()
    full = costs.totals(np.zeros(2))  # 26 MACs, 23 elements
    targets = [Target('flops', 0.85), Target('memory', 0.96)]

    def done(now):
        return any(t.reached(now, full) for t in targets)

    assert pick([5, 30, 1, 4], done=done) == [2]
    # 22 / 23 elements < 0.96, while 23 / 26 MACs > 0.85


def test_work_per_pick_does_not_grow_with_the_model(monkeypatch):
    """After a pick only the tensors of its group are worked out, here 2 of 3."""
    table, rows = chain(10_000), []
    count = CostTable.count

    def counted(self, sizes, which):
        rows.append(len(sizes))
        return count(self, sizes, which)

    monkeypatch.setattr(CostTable, 'count', counted)
    importance = np.random.default_rng(0).random(20_000)
    picked = pick(importance, table, 3000)
    assert picked == np.argsort(importance)[:3000].tolist()
    # at first all 3 tensors and 4 pairs; then 2 tensors and their 3 pairs per pick
    assert sorted(rows[:2]) == [3, 4] and len(rows) == 2 + 2 * 3000
    assert max(rows[2:]) == 3


# -- sizes at which groups rest -----------------------------------------------


@pytest.mark.parametrize(
    ('count', 'picked'),
    [
        (99, [9, 0, 1, 2, 5, 6]),
        (4, [9, 0, 1, 2]),
        (3, [9, 0, 1, 2]),  # a bundle is not cut
        (2, [9, 0]),
    ],
)
def test_groups_rest_at_multiples(count, picked):
    # Both go from 5 to 4 by one unit, 1 or 0.5; then by two to 2: 2 + 3 or 5 + 5.
    # Another two would leave none.
    importance = [1, 2, 3, 4, 9, 5, 5, 5, 5, 0.5]
    options = dict(steps=[2, 2], least=[1, 1])
    assert pick(importance, count=count, **options) == picked


def test_bundles_stop_above_the_limit():
    options = dict(steps=[4, 4], least=[3, 5])
    # 8 units rest at 4, which is fewer than the 5 that must stay in B
    assert pick([1] * 16, **options) == [0, 1, 2, 3]


def test_bundles_compete_with_all_that_they_cost_and_save():
    # B first: 1/3. Then the two units of A: 25 / (2·10 + 2·1) < 4/3; then the rest.
    options = dict(normalize='flops', steps=[2, 1])
    assert pick([5, 20, 1, 4], **options) == [2, 0, 1, 3]
    # 35/22 > 4/3
    assert pick([5, 30, 1, 4], **options) == [2, 3, 0, 1]


def test_bundle_needs_enough_known_units():
    assert pick([1, np.nan, 3, 4], steps=[2, 2]) == [2, 3]


# -- how many at once ---------------------------------------------------------


@pytest.mark.parametrize(
    ('bound', 'picked'),
    [
        (0.1, [0]),  # there is always one
        (5.9, [0]),
        (6, [0, 1]),  # 2 units of 1 + 2
        (17.9, [0, 1]),
        (18, [0, 1, 2]),  # 3 units of 1 + 2 + 3
    ],
)
def test_bound_on_the_importance_of_all_picks(bound, picked):
    assert pick([1, 2, 3, 94], bound=bound) == picked


def test_bound_holds_in_the_worst_case():
    """Mask gradients of units that go together add up before they are squared."""
    rng = np.random.default_rng(0)
    alike = np.outer(rng.normal(size=50), [1.0, 1, 1, 1])  # (N, units)
    for gradients in (alike, rng.normal(size=(50, 4))):
        together = np.square(gradients.sum(1)).sum()
        worst = 4 * np.square(gradients).sum()
        assert together <= worst * (1 + 1e-12)
    assert np.square(alike.sum(1)).sum() == pytest.approx(4 * np.square(alike).sum())


# -- limits and targets -------------------------------------------------------


def test_limits_of_groups():
    units = np.array([10, 7, 1])

    def least(widths=(1, 1, 1), **options):
        return Limits.of(units, np.array(widths), **options).least.tolist()

    assert least() == [1, 1, 1]
    assert least(max_ratio=0.5) == [5, 4, 1]
    assert least(max_ratio=0.7) == [3, 3, 1]
    # a group that is smaller than its minimum is closed
    assert least(min_channels=8, max_ratio=0.5) == [8, 7, 1]
    assert least(widths=(4, 1, 16), min_channels=8) == [2, 7, 1]


def test_rest_steps_by_hand():
    # units of 1, 2, 3, 6 and 8 channels until the next multiple of 8
    widths = np.array([1, 2, 3, 6, 8])
    assert Limits.of(widths * 9, widths, divisor=8).steps.tolist() == [8, 4, 8, 4, 1]
    assert Limits.of(widths * 9, widths).steps.tolist() == [1] * 5


# -- residual blocks ----------------------------------------------------------


def residual():
    """a makes the 2 channels of stream S; a block of b, c with 3 channels I inside; d.

    MACs: a 2·1·10 = 20, b 3·2 = 6, c 2·3 = 6, d 1·2 = 2; 34 in all. A unit of S saves
    10 + 3 + 3 + 1 = 17, one of I 2 + 2 = 4, the block 12.
    """
    shapes = {'a': (2, 1), 'block.b': (3, 2), 'block.c': (2, 3), 'd': (1, 2)}
    profiles = {n: LayerProfile(10 if n == 'a' else 1, 1) for n in shapes}
    two, three = np.arange(2)[:, None], np.arange(3)[:, None]
    stream = [('a', 0, 'out'), ('block.b', 1, 'in'), ('block.c', 0, 'out')]
    stream.append(('d', 1, 'in'))
    inner = [('block.b', 0, 'out'), ('block.c', 1, 'in')]
    groups = [
        ChannelGroup('a', tuple(Member(n, dim, two, role) for n, dim, role in stream)),
        ChannelGroup('b', tuple(Member(n, dim, three, role) for n, dim, role in inner)),
    ]
    blocks = [ResidualBlock('block', 'block.c')]
    return CostTable(shapes, profiles, groups, blocks=blocks)


def test_what_a_block_saves_now():
    costs = residual()
    assert costs.totals(np.zeros(3))['macs'] == 34
    assert costs.totals(np.array([0, 0, 1]))['macs'] == 22
    # One of S and the block are gone: a 10, d 1.
    assert costs.totals(np.array([1, 0, 1]))['macs'] == 11
    running = RunningCosts(costs, np.zeros(3, dtype=int))
    assert running.savings('macs').tolist() == [17, 4, 12]
    running.remove(1, 1)  # b 2·2, c 2·2
    assert running.savings('macs').tolist() == [15, 4, 8]
    running.remove(0, 1)  # b 2·1, c 1·2
    assert running.savings('macs').tolist() == [15, 2, 4]
    running.remove(2, 1)
    assert running.totals['macs'] == 11
    assert running.savings('macs').tolist() == [11, 0, 0]
    again = RunningCosts(costs, np.array([1, 1, 1]))
    assert again.savings('macs').tolist() == [11, 0, 0]


@pytest.mark.parametrize(
    ('of_block', 'count', 'expected'),
    [
        # 12/12 before 5/4 and 60/17: the block goes, and units 2 to 4 with it; then a
        # unit of S saves 11.
        (12, 2, [5, 0, 2, 3, 4]),
        # 5/4, then 8/4 before 20/8, then 20/4 before 60/13 no more; I keeps one.
        (20, 2, [2, 3]),
        (20, 4, [2, 3, 0, 5, 4]),
        (np.nan, 4, [2, 3, 0]),
    ],
)
def test_a_block_goes_by_what_it_saves_with_the_channels_that_it_has(
    of_block, count, expected
):
    bounds = Limits(np.array([1, 1]), np.array([1, 1])).with_blocks([[1]])
    importance = np.array([60, 80, 5, 8, 12, of_block], dtype=float)
    group_of, kept = np.array([0, 0, 1, 1, 1, 2]), np.ones(6, dtype=bool)
    options = (residual(), bounds, 'macs', lambda now: False, count)
    assert select_units(importance, group_of, kept, *options).tolist() == expected
    # A second decision leaves alone what is gone.
    kept[expected] = False
    rest = select_units(importance, group_of, kept, *options).tolist()
    assert not set(rest) & set(expected)
    assert all(unit != 1 or 0 in rest for unit in rest)


def test_a_target_below_all_channels_is_within_reach_of_blocks():
    bounds = Limits(np.array([2, 3]), np.array([1, 1]))
    assert bounds.with_blocks([[1]]).smallest(np.array([2, 3, 1])).tolist() == [2, 3, 0]
