"""Random widths of all groups: those that a profile is fitted to, and others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmgfp.groups import ChannelGroup
from mmgfp.selection.costs import CostTable

#: What widths are multiples of where a layout of blocks shall not break.
ALIGNED = 8
#: The narrowest that a group gets, as a share.
NARROWEST = 0.1
#: Shares that a few cuts keep at least, so that the way to the whole model is known.
NEAR = 0.8
#: One cut in so many is such a one.
NEAR_EVERY = 8
#: MACs of the cuts that check a profile, as shares.
CHECKED = (0.2, 0.7)


def kept_units(groups: Sequence[ChannelGroup], counts: np.ndarray) -> np.ndarray:
    """Return a mask of units, (U,), that keeps the first ``counts`` of each group."""
    return np.concatenate(
        [np.arange(g.units) < n for g, n in zip(groups, counts, strict=True)]
    )


def fitting_cuts(
    sizes: np.ndarray, widths: np.ndarray, cuts: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return units kept of each group in each cut, (G,): the whole model first.

    Latin hypercubes: in each half of the cuts, every group gets every part of its
    range once. One half keeps multiples of `ALIGNED` channels, and a few of its cuts
    nearly all of them; in the other half, what a width is a multiple of is drawn for
    each group.

    Args:
        sizes: Units of each group, (G,).
        widths: Channels of one unit of each group, (G,).
        cuts: Number of cuts, at least 3.
        rng: Makes them random.
    """
    aligned, near = cuts // 2, cuts // NEAR_EVERY
    result: list[np.ndarray] = [sizes]
    wide = _hypercube(len(sizes), aligned - near, rng)
    wide = np.concatenate([wide, _hypercube(len(sizes), near, rng, NEAR)])
    for i, shares in enumerate(wide):
        blocks = np.full(len(sizes), ALIGNED * (1 + i % 2))
        result.append(_units(shares, sizes, widths, blocks))
    for shares in _hypercube(len(sizes), cuts - 1 - aligned, rng):
        drawn = rng.choice([1, 2, 4, ALIGNED], len(sizes))
        result.append(_units(shares, sizes, widths, drawn))
    return result


def checking_cuts(
    costs: CostTable,
    sizes: np.ndarray,
    widths: np.ndarray,
    cuts: int,
    multiple: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Return units kept of each group in random cuts of `CHECKED` MACs.

    Args:
        costs: Costs of the model.
        sizes: Units of each group, (G,).
        widths: Channels of one unit of each group, (G,).
        cuts: Number of cuts.
        multiple: What widths are multiples of.
        rng: Makes them random.
    """
    full = costs.totals(np.zeros(len(sizes)))
    result: list[np.ndarray] = []
    tries = 0
    while len(result) < cuts:
        tries += 1
        # Evenly spread over the MACs; models that cannot get there take what they can.
        low, high = CHECKED
        goal = low + (high - low) * (len(result) + 0.5) / cuts
        level = np.sqrt(goal) if tries % 50 else rng.uniform(NARROWEST, 1)
        shares = np.clip(level + rng.uniform(-0.4, 0.4, len(sizes)), NARROWEST, 1)
        units = _units(shares, sizes, widths, np.full(len(sizes), multiple))
        ratio = costs.totals(sizes - units).ratio('macs', full)
        near = abs(ratio - goal) < (high - low) / cuts
        if (near and low <= ratio <= high) or tries > 1000:
            result.append(units)
            tries = 0
    return result


def with_whole(
    cuts: Sequence[np.ndarray], whole: np.ndarray, times: int
) -> list[np.ndarray]:
    """Return the cuts with the whole model before, between and after them.

    What disturbs a machine comes and goes: the whole model, which every target is a
    share of, must not depend on one moment.

    Args:
        cuts: Units kept of each group in each cut, (G,).
        whole: All units of each group, (G,).
        times: How often the whole model is measured.
    """
    places = np.linspace(0, len(cuts), times).round().astype(int).tolist()
    result = list(cuts)
    for place in reversed(places):
        result.insert(place, whole)
    return result


def _hypercube(
    groups: int, cuts: int, rng: np.random.Generator, narrowest: float = NARROWEST
) -> np.ndarray:
    """Return shares to keep in each cut, (cuts, G)."""
    strata = np.stack([rng.permutation(cuts) for _ in range(groups)], 1)  # (cuts, G)
    places = (strata + rng.random((cuts, groups))) / max(cuts, 1)
    return narrowest + (1 - narrowest) * places


def _units(
    shares: np.ndarray, sizes: np.ndarray, widths: np.ndarray, multiple: np.ndarray
) -> np.ndarray:
    """Return numbers of units whose channels are multiples, at least one multiple."""
    steps = multiple // np.gcd(widths, multiple)  # units
    counts = np.round(shares * sizes / steps) * steps
    return np.clip(counts, np.minimum(steps, sizes), sizes).astype(int)
