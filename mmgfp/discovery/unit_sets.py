"""Random sets of units, by which verification and tests remove channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmgfp.groups import ChannelGroup


def random_units(
    groups: Sequence[ChannelGroup],
    share: float | np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw the units to keep: all but a random ``share`` of each group, (U,).

    Each group keeps at least one unit and, unless it has no other, loses one.

    Args:
        groups: The groups.
        share: One share for all groups, or one for each, (G,).
        rng: The generator to draw with.
    """
    return _units(groups, _counts(groups, share), rng)


def uneven_set(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> np.ndarray:
    """Draw the units to keep, (U,): very different, small shares of the groups.

    A split in halves must not go well because both happen to lose as many channels.
    Few stay, so that the draws that follow work on a small model, but both ends of each
    group do, if two units can.
    """
    shares = np.resize([0.5, 0.8], len(groups)) + rng.uniform(0, 0.15, len(groups))
    units = np.array([g.units for g in groups], dtype=int)
    # The next draw needs two units to remove one. Counts that differ by one alone may
    # still go well, as where code rounds.
    most = units - np.where(units > 3, 2, 1) - np.resize([2, 0], len(groups))
    counts = np.minimum(_counts(groups, shares), np.maximum(most, units > 1))
    return _units(groups, counts, rng, spare_ends=True)


def small_sets(
    groups: Sequence[ChannelGroup], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the units to keep, (U,), in three sets that leave a small model.

    Where code centres channels, as pads on both sides, the first unit of a group may go
    or the last one, by whether their number is even, but not both.
    """
    odd = _units(groups, _odd_counts(groups, rng), rng)
    return [odd, _without(groups, 0), _without(groups, -1)]


def _counts(groups: Sequence[ChannelGroup], share: float | np.ndarray) -> np.ndarray:
    """Return how many units make up a ``share`` of each group, (G,)."""
    units = np.array([g.units for g in groups], dtype=int)
    shares = np.broadcast_to(share, len(groups))
    return np.minimum(np.maximum(np.round(shares * units), 1), units - 1).astype(int)


def _odd_counts(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> np.ndarray:
    """Return 1 for every other group, for the rest an odd number below a half, (G,).

    What is to be removed in pairs, or in equal parts, cannot do so by chance.
    """
    counts = [
        1 if i % 2 else 1 + 2 * rng.integers(0, max(g.units // 4, 1))
        for i, g in enumerate(groups)
    ]
    units = np.array([g.units for g in groups], dtype=int)
    return np.minimum(np.array(counts, dtype=int), units - 1)


def _units(
    groups: Sequence[ChannelGroup],
    counts: np.ndarray,
    rng: np.random.Generator,
    spare_ends: bool = False,
) -> np.ndarray:
    """Draw the units to keep: all but so many of each group, (U,).

    With ``spare_ends`` the first and the last unit of a group go after all others.
    """
    parts = []
    for group, count in zip(groups, counts, strict=True):
        kept = np.ones(group.units, dtype=bool)
        order = rng.permutation(group.units)
        if spare_ends:
            is_end = np.isin(order, (0, group.units - 1))
            order = np.concatenate([order[~is_end], order[is_end]])
        kept[order[:count]] = False
        parts.append(kept)
    return np.concatenate([np.ones(0, dtype=bool), *parts])


def _without(groups: Sequence[ChannelGroup], unit: int) -> np.ndarray:
    """Return the units to keep, (U,): all but one of each group, if it has others.

    Args:
        groups: The groups.
        unit: Which unit of each group goes, 0 for the first and -1 for the last.
    """
    parts = []
    for group in groups:
        kept = np.ones(group.units, dtype=bool)
        kept[unit] = group.units == 1
        parts.append(kept)
    return np.concatenate([np.ones(0, dtype=bool), *parts])
