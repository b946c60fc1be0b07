"""Schedules: how much of the way to the targets each decision goes.

A schedule is a function of the iteration and of the costs alone, and so has no state
that a resumed run could lose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mmgfp.selection.costs import Totals
from mmgfp.selection.targets import Target
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import Registry
from mmgfp.utils.validation import check, check_count

#: Largest importance that the units of one automatic decision may have together, at
#: worst, as a share of the importance of all units.
AUTO_SHARE = 0.01


@dataclass(frozen=True)
class DecisionPoint:
    """The state of a run when a decision is due.

    Attributes:
        iteration: Iterations of the run so far, this one included.
        interval: Iterations between two decisions.
        now: Costs of the remaining model.
        full: Costs of the unpruned model.
        targets: All targets.
        pending: Targets not reached yet.
        importance: Importance of each unit, (U,); NaN where nothing is known.
        kept: Units not pruned yet, (U,).
    """

    iteration: int
    interval: int
    now: Totals
    full: Totals
    targets: Sequence[Target]
    pending: Sequence[Target]
    importance: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Quota:
    """Bounds on one decision; whichever is met first ends it.

    Attributes:
        units: Number of units; with 0, nothing goes this time.
        importance: Largest importance of all that go as one unit, at worst: their
            number times the sum of their importances.
        waypoints: Shares of costs at which the decision ends, once all are reached.
    """

    units: float = float('inf')
    importance: float = float('inf')
    waypoints: tuple[Target, ...] = ()

    def is_met(self, now: Totals, point: DecisionPoint) -> bool:
        """Return whether the decision at ``point`` ends at these costs.

        Args:
            now: Costs of the model after some picks.
            point: The state of the run when the decision began.
        """
        if self.units <= 0:
            return True
        on_the_way = [t.reached(now, point.full) for t in self.waypoints]
        at_a_target = any(t.reached(now, point.full) for t in point.pending)
        return at_a_target or (bool(on_the_way) and all(on_the_way))


class Schedule(ABC):
    """Says at each decision how much may go.

    A decision ends at a target in any case, so that a checkpoint can be written there.
    A class of your own is registered with ``@SCHEDULES.register('name')`` and asked for
    by ``schedule=dict(type='name', ...)``.

    Attributes:
        needs_additive: Whether it works only with a criterion whose scores add up.
        at_once: Whether each target is reached by one decision.
    """

    needs_additive: ClassVar[bool] = False
    at_once: ClassVar[bool] = False

    @abstractmethod
    def quota(self, point: DecisionPoint) -> Quota:
        """Return how much the decision at ``point`` may take."""

    def interval(self, interval: int) -> int:
        """Return the iterations between two decisions.

        Args:
            interval: The ``interval`` among the options of the run.
        """
        return interval

    def check(self, interval: int, targets: Sequence[Target]) -> None:  # noqa: B027
        """Refuse a run that the schedule does not fit.

        Raises:
            ConfigError: If it does not.
        """


#: Schedules by name.
SCHEDULES: Registry[Schedule] = Registry('schedule')


@SCHEDULES.register('fixed')
class FixedSchedule(Schedule):
    """The same number of units at each decision (paper, algorithm 2, takes one).

    Args:
        units: Units that go at each decision.
    """

    def __init__(self, units: int = 1) -> None:
        check_count('units', units)
        self.units = units

    def quota(self, point: DecisionPoint) -> Quota:
        """Return the number of units."""
        return Quota(units=self.units)


@SCHEDULES.register('auto')
class AutoSchedule(Schedule):
    """As many units as together have, at worst, little of all importance.

    Args:
        share: That little, as a share of the importance of all units, in (0, 1).
    """

    needs_additive = True

    def __init__(self, share: float = AUTO_SHARE) -> None:
        is_valid = isinstance(share, float) and 0 < share < 1
        check('share', is_valid, 'a number in (0, 1)', share)
        self.share = share

    def quota(self, point: DecisionPoint) -> Quota:
        """Return the bound; a factor on the loss changes nothing about what goes."""
        known = point.importance[point.kept & np.isfinite(point.importance)]
        return Quota(importance=self.share * float(known.sum()))


class TimedSchedule(Schedule):
    """A way to the targets that takes a given number of iterations.

    Args:
        iterations: Iterations in which the last target is reached.
    """

    def __init__(self, iterations: int) -> None:
        check_count('iterations', iterations)
        self.iterations = iterations

    def check(self, interval: int, targets: Sequence[Target]) -> None:
        """Refuse fewer decisions than there are targets.

        Raises:
            ConfigError: If there are fewer.
        """
        least = interval * len(targets)
        check(
            'iterations',
            self.iterations >= least,
            f'at least the interval for each target, {least}',
            self.iterations,
        )

    def progress(self, point: DecisionPoint) -> float:
        """Return the share of all decisions that are done after this one, in [0, 1].

        A decision ends at a target, so one is kept in hand for each further one.
        """
        decisions = self.iterations // point.interval - (len(point.targets) - 1)
        return min(point.iteration // point.interval / max(decisions, 1), 1.0)


@SCHEDULES.register('linear')
class LinearSchedule(TimedSchedule):
    """A straight line from the costs now to each target.

    Units that go in blocks (``divisor``) can take more of the way than a decision's
    share. Later decisions then wait until the line from the unpruned model has come
    down to the costs, so that a run does not end early.

    Args:
        iterations: Iterations in which the last target is reached.
    """

    def quota(self, point: DecisionPoint) -> Quota:
        """Return where the lines are after this decision; no units ahead of them."""
        left = 1 - self.progress(point)
        # Exactly the target at the end: a line above it, by rounding, never ends.
        lines = [Target(t.cost, t.ratio + (1 - t.ratio) * left) for t in point.pending]
        if all(line.reached(point.now, point.full) for line in lines):
            return Quota(units=0)
        decisions = self.iterations // point.interval
        decisions -= point.iteration // point.interval - 1
        return Quota(
            waypoints=line_waypoints(point.now, point.full, point.pending, decisions)
        )


@SCHEDULES.register('cubic')
class CubicSchedule(TimedSchedule):
    """Fast at first, slow at the end: Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1.

    At decision k of n the share of a cost is ``r + (1 - r) · (1 - k / n)³`` on the way
    to the ratio r.

    Args:
        iterations: Iterations in which the last target is reached.

    Examples:
        Half of the way's MACs go in the first fifth of the decisions:

        >>> [round(cubic_share(0.5, k / 5), 3) for k in range(6)]
        [1.0, 0.756, 0.608, 0.532, 0.504, 0.5]
    """

    def quota(self, point: DecisionPoint) -> Quota:
        """Return where the curves are after this decision."""
        done = self.progress(point)
        return Quota(
            waypoints=tuple(
                Target(t.cost, cubic_share(t.ratio, done)) for t in point.pending
            )
        )


@SCHEDULES.register('one_shot')
class OneShotSchedule(Schedule):
    """All the way to the next target at once.

    Args:
        iterations: Iterations of statistics before each of these decisions, instead
            of the run's ``interval``.
    """

    at_once = True

    def __init__(self, iterations: int | None = None) -> None:
        if iterations is not None:
            check_count('iterations', iterations)
        self.iterations = iterations

    def interval(self, interval: int) -> int:
        """Return the iterations before each decision."""
        return self.iterations or interval

    def quota(self, point: DecisionPoint) -> Quota:
        """Return no bound but the target itself."""
        return Quota()


def cubic_share(ratio: float, progress: float) -> float:
    """Return the share of a cost on the cubic way to ``ratio``.

    Args:
        ratio: The share at the end.
        progress: How much of the way lies behind, in [0, 1].
    """
    return ratio + (1 - ratio) * (1 - progress) ** 3


def line_waypoints(
    now: Totals, full: Totals, targets: Sequence[Target], decisions: int
) -> tuple[Target, ...]:
    """Return where straight lines from here to the targets are after one decision.

    Args:
        now: Costs of the remaining model.
        full: Costs of the unpruned model.
        targets: Targets not reached yet.
        decisions: Decisions until the targets, this one among them. As a decision ends
            at a target, one is kept in hand for each further one.
    """
    decisions -= len(targets) - 1
    if decisions <= 1:
        return tuple(targets)
    shares = [now.ratio(t.cost, full) for t in targets]
    return tuple(
        Target(t.cost, share + (t.ratio - share) / decisions)
        for t, share in zip(targets, shares, strict=True)
    )


def build_schedule(
    schedule: object, units_per_step: int | str, iterations: int | None
) -> Schedule:
    """Build the schedule that these options of a run ask for.

    Args:
        schedule: A name or ``dict(type=name, ...)``; None to go by the others.
        units_per_step: A number of units, or ``'auto'``.
        iterations: Iterations of a straight line to the last target.

    Raises:
        ConfigError: If options are mutually exclusive or not valid.
    """
    if units_per_step != 'auto':
        expected = 'a whole number of at least 1, or auto'
        check_count('units_per_step', units_per_step, expected)
    given = [
        f'{name}={value!r}'
        for name, value, default in (
            ('units_per_step', units_per_step, 1),
            ('iterations', iterations, None),
            ('schedule', schedule, None),
        )
        if value != default
    ]
    if len(given) > 1:
        raise ConfigError(
            'units_per_step, iterations and schedule are mutually exclusive '
            f'(got {" and ".join(given)}); keep one of them'
        )
    if schedule is not None:
        return SCHEDULES.build(schedule)  # type: ignore[arg-type]
    if iterations is not None:
        return LinearSchedule(iterations)
    if isinstance(units_per_step, str):
        return AutoSchedule()
    return FixedSchedule(units_per_step)
