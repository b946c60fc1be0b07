"""The greedy choice of the units that go (paper, algorithm 2): pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmgfp.selection.costs import CostTable, RunningCosts, Totals
from mmgfp.selection.queues import Queues

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
        inside: Groups that go with a residual block, by the number of the block, which
            is that of a group of one unit after all others.
        divisor: What groups' numbers of channels are multiples of at rest, which gives
            the steps.
    """

    least: np.ndarray
    steps: np.ndarray
    shares: np.ndarray | None = None
    inside: Mapping[int, Sequence[int]] = field(default_factory=dict)
    divisor: int = 1

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
        steps = divisor // np.gcd(widths, divisor)
        return cls(least, steps, shares, divisor=divisor)

    def with_blocks(self, inside: Sequence[Sequence[int]]) -> Limits:
        """Return the limits of the same groups and of residual blocks, which may go.

        Args:
            inside: Numbers of the groups that go with each block.

        Examples:
            >>> limits = Limits(least=np.array([3, 1]), steps=np.array([1, 1]))
            >>> limits.with_blocks([[1]]).inside
            {2: [1]}
        """
        first, blocks = len(self.least), len(inside)
        return replace(
            self,
            least=np.append(self.least, np.zeros(blocks, dtype=int)),
            steps=np.append(self.steps, np.ones(blocks, dtype=int)),
            inside={first + b: groups for b, groups in enumerate(inside)},
        )

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
    one furthest behind its share instead. A block takes the units inside of it along.

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
    queues = Queues(importance, group_of, kept, limits)
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
    return np.array(picked + queues.along, dtype=int)
