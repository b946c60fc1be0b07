"""The greedy choice of the units that go (paper, algorithm 2): pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmgfp.selection.costs import CostTable, RunningCosts, Totals

#: The choice of ``normalize`` that leaves importance as it is (the paper's -U).
NO_NORMALIZATION = 'none'


@dataclass(frozen=True)
class Limits:
    """Bounds on how far each group may shrink.

    Attributes:
        least: Units that must stay in each group, (G,).
        steps: A group comes to rest at multiples of so many units, if it gets fewer at
            all, (G,).
        shares: Shares of the groups' units in proportion to which they shrink, (G,);
            None if units of all groups compete (`scope`).
    """

    least: np.ndarray
    steps: np.ndarray
    shares: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        units: np.ndarray,
        widths: np.ndarray,
        min_channels: int = 1,
        max_ratio: float = 1.0,
        divisor: int = 1,
        shares: np.ndarray | None = None,
    ) -> Limits:
        """Return the limits of groups of ``units`` units, (G,).

        Args:
            units: Units of each group, (G,).
            widths: Channels of one unit of each group, (G,).
            min_channels: Channels that always stay in each group.
            max_ratio: Largest share of a group's units that may go.
            divisor: What a group's number of channels is a multiple of at rest.
            shares: Shares of the groups' units that may go, each group losing units in
                proportion to its own, (G,).

        Examples:
            >>> limits = Limits.of(np.array([64, 9]), np.array([1, 4]), 8, 0.5, 8)
            >>> limits.least.tolist(), limits.steps.tolist()
            ([32, 5], [8, 2])
        """
        by_channels = np.minimum(-(-min_channels // widths), units)
        most = max_ratio if shares is None else np.minimum(max_ratio, shares)
        by_ratio = np.ceil(units * (1 - most) - 1e-9).astype(int)
        least = np.maximum(by_channels, np.maximum(by_ratio, 1))
        return cls(least, divisor // np.gcd(widths, divisor), shares)

    def smallest(self, units: np.ndarray) -> np.ndarray:
        """Return how few units each group can come to rest at, (G,).

        Args:
            units: Units that each group has now, (G,).

        Examples:
            >>> limits = Limits(least=np.array([3, 3, 9]), steps=np.array([1, 4, 8]))
            >>> limits.smallest(np.array([8, 8, 12])).tolist()
            [3, 4, 12]
        """
        return np.minimum(-(-self.least // self.steps) * self.steps, units)


def normalized(
    importance: np.ndarray, costs: RunningCosts, normalize: str
) -> np.ndarray:
    """Return importance per cost that a removal saves (paper, section 3.3), (G,).

    Args:
        importance: Importance of what would go next from each group, (G,).
        costs: Costs of the remaining model.
        normalize: A name in `COSTS`, or ``'none'``.
    """
    if normalize == NO_NORMALIZATION:
        return importance
    return importance / np.maximum(costs.savings(normalize), 1e-30)


def select_units(
    importance: np.ndarray,
    group_of: np.ndarray,
    kept: np.ndarray,
    costs: CostTable,
    limits: Limits,
    normalize: str,
    done: Callable[[Totals], bool],
    count: float = np.inf,
    bound: float = np.inf,
) -> np.ndarray:
    """Greedily pick the units to prune now, (V,) numbers of units.

    Each pick takes the unit with the least normalised importance at the costs that
    the earlier picks leave. Where groups come to rest at some sizes only, it takes the
    bundle of a group's least important units that leads to the next one: their
    importances add up, and so does what they save. Under local scope the group is the
    one that is furthest behind its share instead.

    Args:
        importance: Importance of each unit, (U,); those with NaN are never picked.
        group_of: Group of each unit, ascending, (U,).
        kept: Units not pruned yet, (U,).
        costs: The model's costs.
        limits: How far each group may shrink.
        normalize: A name in `COSTS`, or ``'none'``.
        done: Whether costs are low enough to stop.
        count: Picks end when so many units are picked; a bundle is never cut.
        bound: Largest importance of all picks as one unit, at worst: their number
            times the sum of their importances. The first pick is free.
    """
    queues = _Queues(importance, group_of, kept, limits)
    running = RunningCosts(costs, queues.removed, queues.bundles)
    picked: list[int] = []
    total = 0.0
    while len(picked) < count and not done(running.totals):
        # Units of a group save the same, so only the head of each can be next.
        if limits.shares is None:
            scores = normalized(queues.heads, running, normalize)
        else:
            scores = queues.due(limits.shares)
        g = int(scores.argmin())
        if not np.isfinite(scores[g]):
            break
        size, total = queues.bundles[g], total + queues.heads[g]
        if picked and (len(picked) + size) * total > bound:
            break
        picked += queues.take(g)
        running.remove(g, size, queues.bundles[g])
    return np.array(picked, dtype=int)


def _bundles(remaining: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return how many units lie above the next multiple of ``steps`` below, (G,)."""
    return (remaining - 1) % steps + 1


class _Queues:
    """Candidates of each group, the least important first, of equal ones the first.

    A group is sorted only once it is picked from: its least is found faster without.

    Attributes:
        removed: Units that were gone from each group at first, (G,).
        bundles: Units that go next from each group, (G,).
        heads: Their importance together; infinite where they may not go, (G,).
    """

    def __init__(
        self,
        importance: np.ndarray,
        group_of: np.ndarray,
        kept: np.ndarray,
        limits: Limits,
    ) -> None:
        groups = len(limits.least)
        self._importance = importance
        self._limits = limits
        self._remaining = np.bincount(group_of[kept], minlength=groups)
        self._units_before = np.bincount(group_of, minlength=groups)
        self.removed = self._units_before - self._remaining
        units = np.flatnonzero(kept & np.isfinite(importance))
        ends = np.searchsorted(group_of[units], np.arange(groups + 1)).tolist()
        self._units = [units[start:end] for start, end in pairwise(ends)]
        self._sorted = [False] * groups
        self.bundles = _bundles(self._remaining, limits.steps)
        self.heads = np.array([self._head(g) for g in range(groups)])

    def due(self, shares: np.ndarray) -> np.ndarray:
        """Return when the next units of each group are due on an even way, (G,).

        That is the part of the way to its share that the group has gone when half of
        them are, so that each group is always as near to its part as it can be. Groups
        from which nothing may go are infinitely far off.

        Args:
            shares: Shares of the groups' units that lie on the whole way, (G,).
        """
        gone = self._units_before - self._remaining + self.bundles / 2
        part = gone / np.maximum(self._units_before * shares, 1e-30)
        return np.where(np.isfinite(self.heads), part, np.inf)

    def take(self, group: int) -> list[int]:
        """Remove the units that go next from a group, and return their numbers."""
        size = self.bundles[group]
        self._sort(group)
        units = self._units[group]
        self._units[group] = units[size:]
        self._remaining[group] -= size
        steps = self._limits.steps[group]
        self.bundles[group] = _bundles(self._remaining[group], steps)
        self.heads[group] = self._head(group)
        return units[:size].tolist()

    def _head(self, group: int) -> float:
        """Return the importance of the units that would go next from a group."""
        size, units = self.bundles[group], self._units[group]
        is_stuck = self._remaining[group] - size < self._limits.least[group]
        if is_stuck or len(units) < size:
            return np.inf
        if size == 1 and not self._sorted[group]:
            return float(self._importance[units].min())
        self._sort(group)
        return float(self._importance[self._units[group][:size]].sum())

    def _sort(self, group: int) -> None:
        if not self._sorted[group]:
            units = self._units[group]
            order = self._importance[units].argsort(kind='stable')
            self._units[group], self._sorted[group] = units[order], True
