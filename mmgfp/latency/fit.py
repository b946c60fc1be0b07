"""Fitting of times at some widths to times at any widths."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import nnls

from mmgfp.selection.costs import LayerProfile
from mmgfp.selection.latency import alignment, narrowness, predict, round_up
from mmgfp.selection.latency_profile import (
    ALIGNMENTS,
    KindLatency,
    LatencyProfile,
    LayerLatency,
)

#: Blocks that widths may be rounded up to.
STEPS = (1, 8, 16, 32)
#: A step has to explain so much more of the times than none does.
GAIN = 0.9
#: Pull of the factors towards 1: a layer at an alignment counts against so many.
SHRINKAGE = 1.0
#: Multiples of this number have no factor.
REFERENCE = 16
#: Errors up to this share count by their squares, larger ones by their size.
TRUSTED = 0.05
#: Turns of a fit that lets what was disturbed count less.
TURNS = 8
#: Turns of fitting factors and times.
ROUNDS = 3
#: Cuts that the times of one layer are fitted to, at least.
LEAST = 5

#: The surplus of a profile, at most: a fit beyond it would be one of noise.
MOST_SURPLUS = 0.5

#: The times of a layer, see `LayerLatency`.
Times = tuple[float, float, float, float]


@dataclass(frozen=True)
class Layer:
    """A layer to be fitted.

    Attributes:
        kind: Its kind; layers of one kind share steps and factors.
        shape: Shape of its weight in the unpruned model.
        out_dim: The weight's dimension that holds the output channels.
    """

    kind: str
    shape: tuple[int, ...]
    out_dim: int


@dataclass(frozen=True)
class Samples:
    """Times of one layer in S cuts.

    Attributes:
        widths: Its input and output channels, (S, 2).
        times: Milliseconds, (S,).
        full: Its channels in the unpruned model, (2,).
    """

    widths: np.ndarray
    times: np.ndarray
    full: np.ndarray

    @property
    def aligned(self) -> np.ndarray:
        """Which cuts have no width that may break a layout of blocks, (S,)."""
        is_aligned = alignment(self.widths) >= ALIGNMENTS.index(8)
        chosen = (is_aligned | (self.widths == self.full)).all(1)
        return chosen if chosen.sum() >= LEAST else np.ones(len(chosen), dtype=bool)


def fit_profile(
    origin: Mapping[str, Any],
    layers: Mapping[str, Layer],
    profiles: Mapping[str, LayerProfile],
    cuts: Sequence[Mapping[str, Any]],
) -> LatencyProfile:
    """Return the profile that explains the times of all cuts best.

    Args:
        origin: See `LatencyProfile`.
        layers: The layers by weight.
        profiles: How often they use their weights.
        cuts: Of each cut, ``units``, ``widths`` and ``times`` by weight. The whole
            model is among them; what was measured repeatedly counts once.
    """
    cuts = merged(cuts)
    samples = {
        name: Samples(
            np.array([cut['widths'][name] for cut in cuts], dtype=float),
            np.array([cut['times'][name] for cut in cuts]),
            np.array([layer.shape[1 - layer.out_dim], layer.shape[layer.out_dim]]),
        )
        for name, layer in layers.items()
    }
    kinds: dict[str, KindLatency] = {}
    times: dict[str, Times] = {}
    for kind in dict.fromkeys(layer.kind for layer in layers.values()):
        names = [n for n, layer in layers.items() if layer.kind == kind]
        kinds[kind], fitted = _fit_kind([samples[n] for n in names])
        times |= dict(zip(names, fitted, strict=True))
    scale, surplus = _fit_whole(
        [(samples[n], times[n], kinds[layers[n].kind]) for n in layers]
    )
    return LatencyProfile(
        origin,
        kinds,
        {
            name: LayerLatency(
                layer.kind,
                layer.shape,
                layer.out_dim,
                profiles[name].macs_positions,
                tuple(scale * t for t in times[name]),  # type: ignore[arg-type]
            )
            for name, layer in layers.items()
        },
        surplus,
    )


def merged(cuts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each cut once, with median times that add up to its median total."""
    alike: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for cut in cuts:
        alike.setdefault(tuple(cut['units']), []).append(cut)
    result = []
    for same in alike.values():
        times = {
            name: statistics.median(cut['times'].get(name, 0.0) for cut in same)
            for name in same[0]['times']
        }
        total = statistics.median(sum(cut['times'].values()) for cut in same)
        factor = total / sum(times.values())
        result.append(
            {**same[0], 'times': {name: factor * t for name, t in times.items()}}
        )
    return result


def _fit_whole(
    fits: Sequence[tuple[Samples, Times, KindLatency]],
) -> tuple[float, float]:
    """Return a factor on all times, and the surplus, that explain whole networks.

    With the factor, the layers of the whole model add up to what it took, as targets
    are shares of it. Cuts are then often predicted too high, as a large model
    misses caches that a smaller one does not; the surplus is how much.
    """
    layers = np.array([_predicted(*fit) for fit in fits])  # (L, S)
    narrow = np.array(
        [narrowness(s.widths, s.full, np.array(k.steps)) for s, _, k in fits]
    )
    measured = np.sum([samples.times for samples, _, _ in fits], 0)  # (S,)
    is_whole = np.all([(s.widths == s.full).all(1) for s, _, _ in fits], 0)
    scale = float(np.median(measured[is_whole] / layers.sum(0)[is_whole]))
    straight, less = scale * layers.sum(0), scale * (layers * narrow).sum(0)
    surplus, expected = 0.0, straight
    for _ in range(TURNS):
        weights = _trust(measured / expected - 1) / expected**2
        best = (weights * less) @ (straight - measured)
        best /= max((weights * less) @ less, 1e-12)
        surplus = float(np.clip(best, 0, MOST_SURPLUS))
        expected = straight - surplus * less
    return scale, surplus


def _fit_kind(layers: Sequence[Samples]) -> tuple[KindLatency, list[Times]]:
    """Return the steps and factors of a kind, and the times of its layers."""
    best: tuple[float, KindLatency, list[Times]] | None = None
    for steps in product(STEPS, STEPS):
        kind = KindLatency((steps[0], steps[1]))
        times = [_fit_layer(layer, kind, layer.aligned) for layer in layers]
        for _ in range(ROUNDS):  # with the factors known, all cuts tell about times
            kind = KindLatency(kind.steps, _fit_factors(layers, times, kind.steps))
            times = [_fit_layer(layer, kind) for layer in layers]
        error = sum(_error(s, t, kind) for s, t in zip(layers, times, strict=True))
        if best is None or error < GAIN * best[0]:
            best = error, kind, times
    assert best is not None
    return best[1], best[2]


def _fit_layer(
    samples: Samples, kind: KindLatency, chosen: np.ndarray | slice = slice(None)
) -> Times:
    """Return the times that miss the chosen cuts least, as shares of what they are."""
    steps = np.array(kind.steps)
    shares = round_up(samples.widths, steps) / round_up(samples.full, steps)
    x, y = shares[chosen].T
    # Without what a width costs more for not being a multiple.
    factors = _predicted(samples, (1.0, 0.0, 0.0, 0.0), kind)
    plain = np.maximum(samples.times / factors, 1e-6)[chosen]
    terms = np.stack([np.ones_like(x), x, y, x * y], 1)
    # A term that does not vary is the constant.
    varies = [True, np.ptp(x) > 0, np.ptp(y) > 0, np.ptp(x) > 0 and np.ptp(y) > 0]
    expected, trust = plain, np.ones(len(plain))
    for _ in range(TURNS):
        # Shares of the times expected, not of those measured, or what was disturbed
        # would count less and all times come out too short.
        weights = trust / expected
        solution, _ = nnls(terms * varies * weights[:, None], plain * weights)
        expected = np.maximum(terms * varies @ solution, 1e-6)
        trust = np.sqrt(_trust(plain / expected - 1))
    return tuple((solution * varies).tolist())


def _fit_factors(
    layers: Sequence[Samples], times: Sequence[Times], steps: tuple[int, int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return factors on the input and the output side by alignment."""
    neutral = KindLatency(steps)
    rows, logs = [], []
    for samples, fitted in zip(layers, times, strict=True):
        ratio = samples.times / np.maximum(_predicted(samples, fitted, neutral), 1e-9)
        # Columns: alignments of the input, then those of the output.
        side = np.eye(len(ALIGNMENTS))[alignment(samples.widths)]  # (S, 2, alignments)
        side[samples.widths == samples.full] = 0
        # Without a reference, factors and times could trade places.
        side[:, :, ALIGNMENTS.index(REFERENCE) :] = 0
        rows.append(side.reshape(len(ratio), -1))
        logs.append(np.log(np.clip(ratio, 0.1, 10.0)))
    a, b = np.concatenate(rows), np.concatenate(logs)
    pull = SHRINKAGE * np.eye(a.shape[1])
    trust = np.ones(len(b))
    for _ in range(TURNS):
        solution = np.linalg.solve(a.T * trust @ a + pull, a.T * trust @ b)
        trust = _trust(b - a @ solution)
        trust /= np.median(trust)
    factors = np.exp(solution).reshape(2, -1).tolist()
    return tuple(factors[0]), tuple(factors[1])


def _trust(errors: np.ndarray) -> np.ndarray:
    """Return weights that let what was disturbed count less (Huber's)."""
    return np.minimum(1, TRUSTED / np.maximum(np.abs(errors), 1e-9))


def _error(samples: Samples, times: Times, kind: KindLatency) -> float:
    ratio = np.maximum(_predicted(samples, times, kind), 1e-9) / samples.times
    # As sure of a rare large error as of a small one: a half of all may be disturbed.
    return float(samples.times.mean() * np.abs(np.log(ratio)).sum())


def _predicted(samples: Samples, times: Times, kind: KindLatency) -> np.ndarray:
    count = len(samples.times)
    return predict(
        np.tile(times, (count, 1)),
        samples.widths,
        np.tile(samples.full, (count, 1)),
        np.tile(kind.steps, (count, 1)),
        np.tile(kind.factors, (count, 1, 1)),
    )
