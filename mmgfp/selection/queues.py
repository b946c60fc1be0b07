"""The candidates of each group for the greedy choice."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmgfp.selection.greedy import Limits


def _bundles(remaining: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return how many units lie above the next multiple of ``steps`` below, (G,)."""
    return (remaining - 1) % steps + 1


class Queues:
    """Candidates of each group, the least important first, of equal ones the first.

    A group is sorted only once it is picked from: its least is found faster without.

    Attributes:
        removed: Units that were gone from each group at first, (G,).
        bundles: Units that go next from each group, (G,).
        heads: Their importance together; infinite where they may not go, (G,).
        along: Units that are gone with a block.
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
        self._left = np.where(kept, group_of, -1)  # groups of units that are left
        self.along: list[int] = []
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
        self._left[units[:size]] = -1
        for inside in self._limits.inside.get(group, ()):
            self._units[inside] = units[:0]
            self.heads[inside] = np.inf
            self.along += np.flatnonzero(self._left == inside).tolist()
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
