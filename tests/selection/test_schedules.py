"""Targets, and what each schedule gives at each decision, worked out by hand."""

import numpy as np
import pytest

from mmgfp.config import PruningConfig
from mmgfp.selection.costs import Totals
from mmgfp.selection.schedules import (
    SCHEDULES,
    DecisionPoint,
    Quota,
    build_schedule,
    line_waypoints,
)
from mmgfp.selection.targets import Target
from mmgfp.utils.errors import ConfigError

FULL = Totals(dict(macs=100, memory=200, params=50))
FLOPS, MEMORY = Target('flops', 0.5), Target('memory', 0.5)


def point(iteration, now=FULL, targets=(FLOPS,), reached=(), importance=(1.0,)):
    """A decision, one every five iterations."""
    pending = [t for t in targets if t not in reached]
    importance = np.array(importance)
    kept = np.ones(len(importance), dtype=bool)
    return DecisionPoint(iteration, 5, now, FULL, targets, pending, importance, kept)


def ratios(quota):
    return [t.ratio for t in quota.waypoints]


def test_fixed_number():
    assert SCHEDULES.build(dict(type='fixed', units=7)).quota(point(5)) == Quota(7)
    assert SCHEDULES.build('fixed').quota(point(5)) == Quota(1)


def test_auto_takes_a_share_of_the_known_importance_of_kept_units():
    importance = [100, 250, np.nan, 7, 150.0]
    for factor in (1, 65536):
        state = point(5, importance=np.multiply(importance, factor))
        state.kept[3] = False
        bound = SCHEDULES.build('auto').quota(state).importance
        assert bound == pytest.approx(0.01 * 500 * factor)


def test_waypoints_lie_on_straight_lines():
    now = Totals(dict(macs=90, memory=160, params=50))
    (waypoint,) = line_waypoints(now, FULL, [FLOPS], 4)
    assert (waypoint.cost, waypoint.ratio) == ('flops', pytest.approx(0.8))
    # One of the four is kept in hand, as a decision ends where it meets a target.
    waypoints = line_waypoints(now, FULL, [FLOPS, MEMORY], 4)
    assert [w.ratio for w in waypoints] == pytest.approx([0.9 - 0.4 / 3, 0.7])
    for late in (2, 1, 0, -3):
        assert line_waypoints(now, FULL, [FLOPS, MEMORY], late) == (FLOPS, MEMORY)
    linear = SCHEDULES.build(dict(type='linear', iterations=23))  # decides at 5 to 20
    assert ratios(linear.quota(point(5, now))) == pytest.approx([0.8])
    assert ratios(linear.quota(point(20, now))) == [0.5]


def test_a_linear_schedule_waits_while_it_is_ahead():
    """The line from the unpruned model is at 87.5, 75, 62.5 and 50 % of the MACs."""
    linear = SCHEDULES.build(dict(type='linear', iterations=20))

    def at(iteration, macs, targets=(FLOPS,)):
        now = Totals(dict(macs=macs, memory=200, params=50))
        return linear.quota(point(iteration, now, targets))

    assert at(5, 75) == at(10, 75) == Quota(units=0)
    assert ratios(at(15, 75)) == pytest.approx([0.625])
    assert ratios(at(10, 76)) == pytest.approx([0.76 - 0.26 / 3])
    assert ratios(at(20, 51)) == ratios(at(25, 51)) == [0.5]
    assert at(5, 50, (FLOPS, MEMORY)).units > 0  # the memory is behind
    # 0.29 * 100 < 29 in floating point: not reached, so there is no line to wait for.
    for late in (20, 25):
        assert ratios(at(late, 29, (Target('flops', 0.29),))) == [0.29]


def test_cubic_by_hand():
    """1/2 + 1/2 (1 - k/4)³ at decision k of 4; later ones stay at the target."""
    cubic = SCHEDULES.build(dict(type='cubic', iterations=20))
    shares = [ratios(cubic.quota(point(5 * k)))[0] for k in range(1, 6)]
    assert shares == [0.5 + 27 / 128, 0.5 + 8 / 128, 0.5 + 1 / 128, 0.5, 0.5]
    # Two targets: one of four decisions is kept in hand, so each is the third of a way.
    both = cubic.quota(point(5, targets=(FLOPS, Target('memory', 0.1))))
    assert ratios(both) == pytest.approx([0.5 + 4 / 27, 0.1 + 0.9 * 8 / 27])


def test_one_shot_ends_at_targets_only():
    start = point(5, targets=(FLOPS, MEMORY))
    quota = SCHEDULES.build('one_shot').quota(start)
    assert not quota.is_met(Totals(dict(macs=51, memory=101)), start)
    assert quota.is_met(Totals(dict(macs=51, memory=100)), start)


def test_one_shot_decides_after_its_own_number_of_iterations():
    spec = dict(type='one_shot', iterations=400)
    assert PruningConfig(schedule=spec, interval=10).interval == 400
    assert PruningConfig(schedule='one_shot', interval=30).interval == 30
    others = [
        None,
        dict(type='cubic', iterations=400),
        dict(type='linear', iterations=9),
    ]
    assert [PruningConfig(schedule=s, interval=9).interval for s in others] == [9, 9, 9]
    with pytest.raises(ConfigError, match='statistics_interval must be at most .* 4 '):
        PruningConfig(schedule=dict(spec, iterations=4), statistics_interval=5)
    with pytest.raises(ConfigError, match='iterations must be a whole number'):
        PruningConfig(schedule=dict(spec, iterations=0))


def test_decision_ends_at_all_waypoints_or_at_one_target():
    start = point(5, targets=(FLOPS, MEMORY))
    quota = Quota(waypoints=(Target('flops', 0.9), Target('memory', 0.8)))
    assert not quota.is_met(Totals(dict(macs=90, memory=161)), start)
    assert quota.is_met(Totals(dict(macs=90, memory=160)), start)
    assert quota.is_met(Totals(dict(macs=50, memory=200)), start)


@pytest.mark.parametrize(
    ('options', 'name'),
    [
        ((None, 3, None), 'FixedSchedule'),
        ((None, 'auto', None), 'AutoSchedule'),
        ((None, 1, 100), 'LinearSchedule'),
        (('one_shot', 1, None), 'OneShotSchedule'),
        ((dict(type='cubic', iterations=9), 1, None), 'CubicSchedule'),
    ],
)
def test_options_choose_the_schedule(options, name):
    assert type(build_schedule(*options)).__name__ == name


def test_target_labels_are_file_names():
    assert Target.parse({'flops': 0.5}).label == 'flops50'
    assert Target.parse({'memory': 0.125}).label == 'memory12_5'
