"""Latency as a cost: what each layer takes, predicted from its widths."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from mmgfp.selection.costs import COSTS, Cost, CostTable, LayerProfile, TensorSizes
from mmgfp.selection.latency_profile import ALIGNMENTS, LatencyProfile

logger = logging.getLogger('mmgfp')

#: The share of a layer's time that shrinks with its MACs in any case, for savings: what
#: a profile does not see must not make a unit look as if it saved nothing.
LEAST_SLOPE = 0.01
#: How much slower counts as slower, for ``divisor='auto'``.
SLOWER = 0.01


@COSTS.register('latency')
class Latency(Cost):
    """Milliseconds that a runtime takes for a batch, predicted by a profile.

    Args:
        profile: What was measured.

    Examples:
        A layer of 1 ms that takes a quarter of it however narrow it gets:

        >>> from mmgfp.selection.latency_profile import KindLatency, LayerLatency
        >>> times = (0.25, 0.0, 0.0, 0.75)
        >>> layer = LayerLatency('conv', (16, 8, 3, 3), 0, 100.0, times)
        >>> profile = LatencyProfile({}, {'conv': KindLatency()}, {'w': layer})
        >>> narrow = np.array([[8, 8, 3, 3]])
        >>> sizes = TensorSizes(*map(np.array, (['w'], narrow, [0], [100], [100])))
        >>> Latency(profile).count(sizes).tolist()
        [0.625]
    """

    label, unit, scale = 'latency', 'ms', 1.0
    from_profile = True

    def __init__(self, profile: LatencyProfile) -> None:
        self.profile = profile
        self.label = f'latency ({profile.runtime})'
        self._row = {name: i for i, name in enumerate(profile.layers)}
        # The last row stands for parameters that take no time of their own.
        layers, kinds = [*profile.layers.values()], list(profile.kinds)
        count = len(layers)
        self._times = np.zeros((count + 1, 4))
        self._full = np.ones((count + 1, 2))
        self._kind = np.zeros(count + 1, dtype=int)
        for i, layer in enumerate(layers):
            self._times[i] = layer.times
            self._full[i] = layer.widths
            self._kind[i] = kinds.index(layer.kind)
        known = [profile.kinds[k] for k in kinds]
        self._steps = np.array([k.steps for k in known], dtype=float)  # (kinds, 2)
        self._factors = np.array([k.factors for k in known])  # (kinds, 2, alignments)
        self._whole = self._times.sum(1)  # ms at full width

    def check_fits(
        self,
        shapes: Mapping[str, Sequence[int]],
        profiles: Mapping[str, LayerProfile],
    ) -> None:
        """Refuse another model, or another input size, than was measured."""
        self.profile.check_fits(shapes, profiles)

    def count(self, sizes: TensorSizes) -> np.ndarray:
        """Return the time of each layer by its weight, (R,)."""
        rows, widths = self._look_up(sizes)
        return predict(
            self._times[rows],
            widths,
            self._full[rows],
            self._steps[self._kind[rows]],
            self._factors[self._kind[rows]],
            self.profile.surplus,
        )

    def count_smoothly(self, sizes: TensorSizes) -> np.ndarray:
        """Return the times without steps, and with a slope everywhere, (R,)."""
        rows, widths = self._look_up(sizes)
        shares = widths / self._full[rows]
        slope = LEAST_SLOPE * self._whole[rows] * shares.prod(1)
        surplus = self.profile.surplus
        return _layer_times(self._times[rows], shares, surplus) + slope

    def _look_up(self, sizes: TensorSizes) -> tuple[np.ndarray, np.ndarray]:
        """Return row numbers, (R,), and input and output widths, (R, 2)."""
        last = len(self._row)
        rows = np.array([self._row.get(name, last) for name in sizes.names], dtype=int)
        widths = np.ones((len(rows), 2))
        if sizes.shapes.shape[1] > 1:
            every = np.arange(len(rows))
            widths[:, 0] = sizes.shapes[every, 1 - np.minimum(sizes.out_dim, 1)]
            widths[:, 1] = sizes.outputs
        return rows, widths


def predict(
    times: np.ndarray,
    widths: np.ndarray,
    full: np.ndarray,
    steps: np.ndarray,
    factors: np.ndarray,
    surplus: float = 0.0,
) -> np.ndarray:
    """Return times of R layers, (R,).

    Args:
        times: See `LayerLatency`, (R, 4).
        widths: Input and output channels, (R, 2).
        full: Those of the unpruned layers, (R, 2).
        steps: See `KindLatency`, (R, 2).
        factors: See `KindLatency`, (R, 2, alignments).
        surplus: See `LatencyProfile`.
    """
    shares = round_up(widths, steps) / round_up(full, steps)
    both = np.take_along_axis(factors, alignment(widths)[:, :, None], 2)[:, :, 0]
    both = np.where(widths == full, 1.0, both)
    return _layer_times(times, shares, surplus) * both.prod(1)


def round_up(widths: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return widths rounded up to multiples."""
    return np.ceil(widths / steps) * steps


def alignment(widths: np.ndarray) -> np.ndarray:
    """Return which of `ALIGNMENTS` is the largest that divides each width.

    Examples:
        >>> alignment(np.array([7, 12, 24, 96, 0])).tolist()
        [0, 2, 3, 5, 5]
    """
    largest = np.gcd(widths.astype(int), ALIGNMENTS[-1])
    return np.log2(largest).astype(int)


def narrowness(widths: np.ndarray, full: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return what the surplus of a profile is multiplied by, 0 at full width, (R,)."""
    return _narrowness(round_up(widths, steps) / round_up(full, steps))


def _narrowness(shares: np.ndarray) -> np.ndarray:
    return 1 - shares.prod(1) ** 2


def _layer_times(times: np.ndarray, shares: np.ndarray, surplus: float) -> np.ndarray:
    x, y = shares.T
    bilinear = times[:, 0] + times[:, 1] * x + times[:, 2] * y + times[:, 3] * x * y
    return bilinear * (1 - surplus * _narrowness(shares))


def choose_divisor(
    divisor: int | str, costs: CostTable, sizes: np.ndarray, widths: np.ndarray
) -> int:
    """Return what channels come to rest at multiples of; warn if others are faster.

    Args:
        divisor: What the run asks for, or ``'auto'``.
        costs: Costs of the model, latency among them.
        sizes: Units of each group, (G,).
        widths: Channels of one unit of each group, (G,).
    """
    best = best_divisor(costs, sizes, widths)
    if divisor == 'auto':
        return best
    if int(divisor) % best:
        logger.warning(
            'divisor=%s leaves widths that are slower than multiples of %d by the '
            "latency profile; divisor='auto' takes these",
            divisor,
            best,
        )
    return int(divisor)


def best_divisor(
    costs: CostTable, sizes: np.ndarray, widths: np.ndarray, cost: str = 'latency'
) -> int:
    """Return the smallest number whose multiples are not slower than larger ones.

    Of each of `ALIGNMENTS`, the whole network is predicted with all groups at odd
    multiples of it, and with each of them widened to multiples of a larger one.

    Args:
        costs: Costs of the model.
        sizes: Units of each group, (G,).
        widths: Channels of one unit of each group, (G,).
        cost: The cost that is to be low.
    """

    def total(channels: np.ndarray) -> float:
        units = np.clip(np.ceil(channels / widths), 1, sizes)
        return costs.totals(sizes - units)[cost]

    full = sizes * widths
    for i, small in enumerate(ALIGNMENTS):
        narrow = [_odd_multiples(full * share, small) for share in (0.4, 0.6, 0.8)]
        slower = any(
            total(channels) > (1 + SLOWER) * total(round_up(channels, np.array(large)))
            for channels in narrow
            for large in ALIGNMENTS[i + 1 :]
        )
        if not slower:
            return small
    return ALIGNMENTS[-1]


def _odd_multiples(channels: np.ndarray, of: int) -> np.ndarray:
    return of * (2 * np.floor(channels / of / 2) + 1)
