"""Latency as a cost: what each layer takes, predicted from its widths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmgfp.selection.costs import COSTS, Cost, CostTable, LayerProfile, TensorSizes
from mmgfp.utils.errors import ConfigError

#: Version of the files that tools/profile_latency.py writes.
VERSION = 1
TOOL = 'tools/profile_latency.py'
#: Widths are told apart by the largest of these numbers that divides them.
ALIGNMENTS = (1, 2, 4, 8, 16, 32)
#: The share of a layer's time that shrinks with its MACs in any case, for savings: what
#: a profile does not see must not make a unit look as if it saved nothing.
LEAST_SLOPE = 0.01
#: How much slower counts as slower, for ``divisor='auto'``.
SLOWER = 0.01
#: Relative difference between counted positions that rounding may leave.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class LayerLatency:
    """The time of one layer, and of the element-wise work on what it puts out.

    At the shares x and y of its input and output channels, each rounded up to the
    kind's step, a layer takes ``a + b·x + c·y + d·x·y``.

    Attributes:
        kind: Kind of the layer, a key of `LatencyProfile.kinds`.
        shape: Shape of its weight in the unpruned model.
        out_dim: The weight's dimension that holds the output channels.
        positions: How often it uses its weight for one image, see `LayerProfile`.
        times: a, b, c and d in milliseconds, none of them negative.
    """

    kind: str
    shape: tuple[int, ...]
    out_dim: int
    positions: float
    times: tuple[float, float, float, float]

    @property
    def widths(self) -> tuple[int, int]:
        """Input and output channels of the weight."""
        return self.shape[1 - self.out_dim], self.shape[self.out_dim]


@dataclass(frozen=True)
class KindLatency:
    """How the time of layers of one kind depends on multiples.

    Attributes:
        steps: Input and output widths count as if rounded up to multiples of these.
        factors: Factors on the time by the alignment of the input and of the output
            width, two for each of `ALIGNMENTS`. Full widths have none.
    """

    steps: tuple[int, int] = (1, 1)
    factors: tuple[tuple[float, ...], tuple[float, ...]] = (
        (1.0,) * len(ALIGNMENTS),
        (1.0,) * len(ALIGNMENTS),
    )


@dataclass(frozen=True)
class LatencyProfile:
    """The latency of a model at any widths, as measured on one machine.

    Attributes:
        origin: Where it was measured: runtime, version, device, processor, threads,
            precision, batch, input_shape, and so on.
        kinds: Kinds of layers by name.
        layers: Layers by the name of their weight.
    """

    origin: Mapping[str, Any]
    kinds: Mapping[str, KindLatency]
    layers: Mapping[str, LayerLatency]

    @classmethod
    def load(cls, path: str | Path) -> LatencyProfile:
        """Read a file that tools/profile_latency.py wrote.

        Raises:
            ConfigError: If it is missing, damaged, unfinished or of another version.
        """
        field, remedy = 'latency_profile', f'write one with {TOOL}'
        try:
            raw = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            got = f'{path}: {error}'
            raise ConfigError(field, 'a readable JSON file', got, remedy) from None
        version = raw.get('version') if isinstance(raw, Mapping) else None
        if version != VERSION:
            expected, got = f'a profile of version {VERSION}', f'{path}: {version!r}'
            raise ConfigError(field, expected, got, remedy)
        if raw.get('fit') is None:
            got = f'{path}, which ends after {len(raw.get("cuts", ()))} cuts'
            remedy = f'run {TOOL} again with the same arguments: it goes on there'
            raise ConfigError(field, 'a finished profile', got, remedy)
        return cls.from_dict(raw['origin'], raw['fit'], str(path))

    @classmethod
    def from_dict(
        cls, origin: Mapping[str, Any], fit: Any, source: str = 'latency_profile'
    ) -> LatencyProfile:
        """Read the result of `to_dict`.

        Raises:
            ConfigError: If it is damaged.
        """
        try:
            kinds = {
                name: KindLatency(
                    (int(kind['steps'][0]), int(kind['steps'][1])),
                    (_numbers(kind['factors'][0], 6), _numbers(kind['factors'][1], 6)),
                )
                for name, kind in fit['kinds'].items()
            }
            layers = {
                name: LayerLatency(
                    str(layer['kind']),
                    tuple(int(n) for n in layer['shape']),
                    int(layer['out_dim']),
                    float(layer['positions']),
                    _numbers(layer['times'], 4),  # type: ignore[arg-type]
                )
                for name, layer in fit['layers'].items()
            }
            _require(bool(layers), 'no layers')
            _require(all(min(k.steps) > 0 for k in kinds.values()), 'a step below 1')
            for name, layer in layers.items():
                is_valid = layer.kind in kinds and layer.out_dim in (0, 1)
                _require(is_valid and len(layer.shape) > 1, name)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            got = f'{type(error).__name__}: {error}'
            remedy = f'write it again with {TOOL}'
            raise ConfigError(source, 'a latency profile', got, remedy) from None
        return cls(dict(origin), kinds, layers)

    def to_dict(self) -> dict[str, Any]:
        """Return ``kinds`` and ``layers`` in plain types, as JSON holds them."""
        return {
            'kinds': {
                name: {'steps': list(k.steps), 'factors': [list(f) for f in k.factors]}
                for name, k in self.kinds.items()
            },
            'layers': {
                name: {
                    'kind': layer.kind,
                    'shape': list(layer.shape),
                    'out_dim': layer.out_dim,
                    'positions': layer.positions,
                    'times': list(layer.times),
                }
                for name, layer in self.layers.items()
            },
        }

    @cached_property
    def digest(self) -> str:
        """A short text that differs between profiles, for runs that are resumed."""
        text = json.dumps([dict(self.origin), self.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def runtime(self) -> str:
        """The runtime and where it ran, for tables and logs."""
        origin = self.origin
        words = [str(origin.get('runtime', '?')), str(origin.get('version', ''))]
        threads = origin.get('threads')
        where = [str(origin.get('device', 'cpu'))]
        if threads is not None and where == ['cpu']:
            where.append(f'{threads} thread{"s" * (threads != 1)}')
        return f'{" ".join(filter(None, words))}, {", ".join(where)}'

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Size (C, H, W) of the image."""
        return tuple(self.origin['input_shape'])

    def check_fits(
        self,
        shapes: Mapping[str, Sequence[int]],
        profiles: Mapping[str, LayerProfile],
    ) -> None:
        """Refuse another model, or another input size, than was measured.

        Args:
            shapes: Shapes of the model's parameters by name.
            profiles: How often its layers use their weights.

        Raises:
            ConfigError: If a layer is missing on either side, or works on something
                else.
        """
        field = 'latency_profile'
        remedy = f'profile the config of this run with {TOOL}'
        for name, layer in self.layers.items():
            got = tuple(shapes.get(name, ()))
            if got != layer.shape:
                expected = f'of this model, where {name} is {got or "not there"}'
                raise ConfigError(field, expected, str(layer.shape), remedy)
            counted = profiles[name].macs_positions if name in profiles else 0.0
            if abs(counted - layer.positions) > TOLERANCE * layer.positions:
                raise ConfigError(
                    field,
                    f'of this input size, at which {name} is used {counted:g} times',
                    f'{layer.positions:g} in an image of {self.input_shape}',
                    f'set input_shape to {self.input_shape}, or profile at the size of '
                    'this run',
                )
        unknown = [n for n, p in profiles.items() if p.macs_positions > 0]
        unknown = [n for n in unknown if n not in self.layers and n in shapes]
        known = set(self.origin.get('not_measured', ()))
        if missing := [n for n in unknown if n not in known]:
            raise ConfigError(field, f'one with {missing[0]}', 'one without', remedy)


def _require(is_valid: bool, problem: str) -> None:
    if not is_valid:
        raise ValueError(problem)


def _numbers(values: Any, count: int) -> tuple[float, ...]:
    """Return ``count`` numbers of at least 0.

    Raises:
        ValueError: If they are something else.
    """
    numbers = tuple(float(v) for v in values)
    is_valid = len(numbers) == count and all(0 <= n < float('inf') for n in numbers)
    _require(is_valid, f'{numbers} are not {count} numbers of at least 0')
    return numbers


@COSTS.register('latency')
class Latency(Cost):
    """Milliseconds that a runtime takes for a batch, predicted by a profile.

    Args:
        profile: What was measured.

    Examples:
        A layer of 1 ms that takes a quarter of it however narrow it gets:

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
        )

    def count_smoothly(self, sizes: TensorSizes) -> np.ndarray:
        """Return the times without steps, and with a slope everywhere, (R,)."""
        rows, widths = self._look_up(sizes)
        shares = widths / self._full[rows]
        slope = LEAST_SLOPE * self._whole[rows] * shares.prod(1)
        return _bilinear(self._times[rows], shares) + slope

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
) -> np.ndarray:
    """Return times of R layers, (R,).

    Args:
        times: See `LayerLatency`, (R, 4).
        widths: Input and output channels, (R, 2).
        full: Those of the unpruned layers, (R, 2).
        steps: See `KindLatency`, (R, 2).
        factors: See `KindLatency`, (R, 2, alignments).
    """
    shares = round_up(widths, steps) / round_up(full, steps)
    both = np.take_along_axis(factors, alignment(widths)[:, :, None], 2)[:, :, 0]
    return _bilinear(times, shares) * np.where(widths == full, 1.0, both).prod(1)


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


def _bilinear(times: np.ndarray, shares: np.ndarray) -> np.ndarray:
    x, y = shares.T
    return times[:, 0] + times[:, 1] * x + times[:, 2] * y + times[:, 3] * x * y


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
