"""Which units go: pure functions of numbers (paper, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmgfp.costs import CostTable, Totals
from mmgfp.errors import ConfigError

NORMALIZATIONS = ('memory', 'flops', 'none')
TARGETS = ('flops', 'memory', 'params')


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


def normalized(importance: np.ndarray, savings: Totals, normalize: str) -> np.ndarray:
    """Importance per cost that a removal saves (paper, section 3.3), (G,)."""
    if normalize == 'none':
        return importance
    return importance / np.maximum(savings[normalize], 1e-30)


def select_units(
    importance: np.ndarray,
    group_of: np.ndarray,
    alive: np.ndarray,
    costs: CostTable,
    limits: Limits,
    normalize: str,
    count: int,
    done: Callable[[Totals], bool],
) -> np.ndarray:
    """Greedily pick the units to prune now.

    Each pick takes the unit with the least normalised importance at the costs that
    the earlier picks leave.

    Args:
        importance: Accumulated Fisher information, (U,); NaN where nothing is known,
            which is never picked.
        group_of: Group of each unit, (U,).
        alive: Units not pruned yet, (U,).
        costs: The model's costs.
        limits: How far each group may shrink.
        normalize: ``'memory'``, ``'flops'`` or ``'none'``.
        count: Units to pick at most.
        done: Whether costs are low enough to stop.

    Returns:
        np.ndarray: Numbers of the picked units; fewer than ``count`` where ``done``
        or the limits say so.
    """
    groups = len(limits.least)
    left = np.bincount(group_of[alive], minlength=groups)
    removed = np.bincount(group_of, minlength=groups) - left
    # Units of a group save the same, so only the least of each group can be next.
    queues = _queues(importance, group_of, alive & ~np.isnan(importance), groups)

    def least(g: int) -> float:
        closed = not queues[g] or left[g] <= limits.least[g]
        return np.inf if closed else importance[queues[g][-1]]

    heads = np.array([least(g) for g in range(groups)])  # (G,)
    picked: list[int] = []
    while len(picked) < count and not done(costs.totals(removed)):
        scores = normalized(heads, costs.savings(removed), normalize)
        g = int(scores.argmin())
        if not np.isfinite(scores[g]):
            break
        picked.append(queues[g].pop())
        left[g] -= 1
        removed[g] += 1
        heads[g] = least(g)
    return np.array(picked, dtype=int)


def _queues(
    importance: np.ndarray, group_of: np.ndarray, candidate: np.ndarray, groups: int
) -> list[list[int]]:
    """Candidates by group; the least important comes last, of equal ones the first."""
    units = np.flatnonzero(candidate)
    units = units[np.lexsort((importance[units], group_of[units]))]
    ends = np.searchsorted(group_of[units], np.arange(1, groups))
    return [part[::-1].tolist() for part in np.split(units, ends)]
