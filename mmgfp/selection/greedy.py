"""Which units go: pure functions of numbers (paper, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mmgfp.selection.costs import CostTable, RunningCosts, Totals
from mmgfp.utils.errors import ConfigError

NORMALIZATIONS = ('memory', 'flops', 'none')
TARGETS = ('flops', 'memory', 'params')
#: Largest importance that the units of one automatic decision may have together, at
#: worst, as a share of what all units have.
AUTO_SHARE = 0.01


@dataclass(frozen=True)
class Target:
    """A bound on a cost, as a share of the unpruned model's.

    Attributes:
        cost: ``'flops'`` (multiply-accumulates), ``'memory'`` or ``'params'``.
        ratio: The share to reach, in (0, 1).
    """

    cost: str
    ratio: float

    @classmethod
    def parse(cls, raw: Any) -> Target:
        """Read ``dict(flops=0.5)``.

        Raises:
            ConfigError: Not exactly one known cost, or a ratio outside (0, 1).
        """
        remedy = f'give one of {", ".join(TARGETS)}, such as dict(flops=0.5)'
        if not isinstance(raw, Mapping) or len(raw) != 1 or set(raw) - set(TARGETS):
            raise ConfigError('target', 'a dict with one cost', repr(raw), remedy)
        ((cost, ratio),) = raw.items()
        if not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise ConfigError(
                f'target.{cost}', 'a ratio between 0 and 1', repr(ratio), remedy
            )
        return cls(cost, float(ratio))

    @property
    def label(self) -> str:
        """A short name for files, such as ``flops50``."""
        return f'{self.cost}{self.ratio * 100:g}'.replace('.', '_')

    def reached(self, now: Totals, full: Totals) -> bool:
        """Whether the costs ``now`` are within the target."""
        return bool(now[self.cost] <= self.ratio * full[self.cost])


@dataclass(frozen=True)
class Limits:
    """How far each group may shrink.

    Attributes:
        least: Units that must stay in each group, (G,).
    """

    least: np.ndarray

    @classmethod
    def of(cls, units: np.ndarray, min_units: np.ndarray, max_ratio: float) -> Limits:
        """Limits of groups of ``units`` units, (G,).

        Args:
            units: Units per group.
            min_units: Units that always stay in each group, at least 1, (G,).
            max_ratio: Largest share of a group's units that may go.
        """
        by_ratio = np.ceil(units * (1 - max_ratio) - 1e-9).astype(int)
        return cls(np.maximum(np.minimum(min_units, units), np.maximum(by_ratio, 1)))


def rest_steps(widths: np.ndarray, divisor: int) -> np.ndarray:
    """Units between two sizes at which a group may come to rest, (G,).

    Args:
        widths: Channels of one unit of each group, (G,).
        divisor: What a group's number of channels is a multiple of.
    """
    return divisor // np.gcd(widths, divisor)


def waypoints(
    now: Totals, full: Totals, targets: Sequence[Target], decisions: int
) -> list[Target]:
    """Where straight lines from here to the targets are after one decision.

    Args:
        now: Costs of what is left.
        full: Costs of the unpruned model.
        targets: Targets not reached yet.
        decisions: Decisions left until the targets, this one among them. As a
            decision ends at a target, one is kept in hand for each further one.
    """
    decisions -= len(targets) - 1
    if decisions <= 1:
        return list(targets)
    shares = [float(now[t.cost] / full[t.cost]) for t in targets]
    return [
        Target(t.cost, share + (t.ratio - share) / decisions)
        for t, share in zip(targets, shares, strict=True)
    ]


def auto_bound(importance: np.ndarray, kept: np.ndarray) -> float:
    """How important the units of one decision may be together, at worst.

    This is `AUTO_SHARE` of the importance that all units have since the last
    decision, so that a factor on the loss changes nothing.

    Args:
        importance: Accumulated Fisher information, (U,); NaN where nothing is known.
        kept: Units not pruned yet, (U,).
    """
    known = importance[kept & np.isfinite(importance)]
    return AUTO_SHARE * float(known.sum())


def normalized(importance: np.ndarray, savings: Totals, normalize: str) -> np.ndarray:
    """Importance per cost that a removal saves (paper, section 3.3), (G,)."""
    if normalize == 'none':
        return importance
    return importance / np.maximum(savings[normalize], 1e-30)


def select_units(
    importance: np.ndarray,
    group_of: np.ndarray,
    kept: np.ndarray,
    costs: CostTable,
    limits: Limits,
    normalize: str,
    count: float,
    done: Callable[[Totals], bool],
    steps: np.ndarray | None = None,
    bound: float = np.inf,
) -> np.ndarray:
    """Greedily pick the units to prune now.

    Each pick takes the unit with the least normalised importance at the costs that
    the earlier picks leave. Where groups come to rest at some sizes only, it takes the
    bundle of a group's least important units that leads to the next one: their
    importances add up, and so does what they save.

    Args:
        importance: Accumulated Fisher information, (U,); NaN where nothing is known,
            which is never picked.
        group_of: Group of each unit, ascending, (U,).
        kept: Units not pruned yet, (U,).
        costs: The model's costs.
        limits: How far each group may shrink.
        normalize: ``'memory'``, ``'flops'`` or ``'none'``.
        count: Picks end when so many units are picked; a bundle is never cut.
        done: Whether costs are low enough to stop.
        steps: The sizes at which each group may rest are multiples of this, (G,).
        bound: Largest importance of all picks as one unit, at worst: their number
            times the sum of their importances. The first pick is free.

    Returns:
        np.ndarray: Numbers of the picked units; fewer than ``count`` where ``done``,
        ``bound`` or the limits say so.
    """
    groups = len(limits.least)
    steps = np.ones(groups, dtype=int) if steps is None else steps
    left = np.bincount(group_of[kept], minlength=groups)
    removed = np.bincount(group_of, minlength=groups) - left
    bundles = _bundles(left, steps)
    running = RunningCosts(costs, removed, bundles)
    # Units of a group save the same, so only the least of each group can be next.
    queues = _Queues(importance, group_of, kept & np.isfinite(importance), groups)

    def least(g: int) -> float:
        stuck = left[g] - bundles[g] < limits.least[g]
        return np.inf if stuck else queues.least(g, bundles[g])

    heads = np.array([least(g) for g in range(groups)])  # (G,)
    picked: list[int] = []
    total = 0.0
    while len(picked) < count and not done(running.totals):
        scores = normalized(heads, running.savings, normalize)
        g = int(scores.argmin())
        if not np.isfinite(scores[g]):
            break
        size, total = bundles[g], total + heads[g]
        if picked and (len(picked) + size) * total > bound:
            break
        picked += queues.take(g, size)
        left[g] -= size
        bundles[g] = _bundles(left[g], steps[g])
        running.remove(g, size, bundles[g])
        heads[g] = least(g)
    return np.array(picked, dtype=int)


def _bundles(left: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Units between ``left`` ones and the next multiple of ``steps`` below, (G,)."""
    return (left - 1) % steps + 1


class _Queues:
    """Candidates of each group, the least important first, of equal ones the first.

    A group is put in order once it is picked from; its least is found without.
    """

    def __init__(
        self,
        importance: np.ndarray,
        group_of: np.ndarray,
        candidate: np.ndarray,
        groups: int,
    ) -> None:
        self._importance = importance
        units = np.flatnonzero(candidate)
        ends = np.searchsorted(group_of[units], np.arange(groups + 1)).tolist()
        self._units = [units[start:end] for start, end in pairwise(ends)]
        self._sorted = [False] * groups

    def least(self, group: int, size: int) -> float:
        """Importance of the ``size`` units that come first; infinite if they lack."""
        units = self._units[group]
        if len(units) < size:
            return np.inf
        if size == 1 and not self._sorted[group]:
            return float(self._importance[units].min())
        self._sort(group)
        return float(self._importance[self._units[group][:size]].sum())

    def take(self, group: int, size: int) -> list[int]:
        """Remove the ``size`` units that come first."""
        self._sort(group)
        units = self._units[group]
        self._units[group] = units[size:]
        return units[:size].tolist()

    def _sort(self, group: int) -> None:
        if not self._sorted[group]:
            units = self._units[group]
            order = self._importance[units].argsort(kind='stable')
            self._units[group], self._sorted[group] = units[order], True
