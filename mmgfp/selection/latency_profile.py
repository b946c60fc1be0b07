"""Files that hold what each layer of a model takes at any widths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.words import counted

#: Version of the files that tools/profile_latency.py writes.
VERSION = 1
TOOL = 'tools/profile_latency.py'
#: Widths are told apart by the largest of these numbers that divides them.
ALIGNMENTS = (1, 2, 4, 8, 16, 32)
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
        surplus: By which share narrow layers are faster than their times say, 0 to 1:
            ``1 - surplus·(1 - (x·y)²)`` of them count.
    """

    origin: Mapping[str, Any]
    kinds: Mapping[str, KindLatency]
    layers: Mapping[str, LayerLatency]
    surplus: float = 0.0

    @classmethod
    def load(cls, path: str | Path) -> LatencyProfile:
        """Read a file that tools/profile_latency.py wrote.

        Raises:
            ConfigError: If it is missing, damaged, unfinished or of another version.
        """
        field, remedy = 'latency_profile', f'write one with {TOOL}'
        try:
            raw = json.loads(Path(path).read_text())
        except (OSError, TypeError, ValueError, RecursionError) as error:
            got = f'{path}: {error}'
            raise ConfigError(field, 'a readable JSON file', got, remedy) from None
        version = raw.get('version') if isinstance(raw, Mapping) else None
        if version != VERSION:
            expected, got = f'a profile of version {VERSION}', f'{path}: {version!r}'
            raise ConfigError(field, expected, got, remedy)
        if raw.get('fit') is None:
            cuts = raw.get('cuts')
            count = len(cuts) if isinstance(cuts, list) else 0
            got = f'{path}, which ends after {count} cuts'
            remedy = f'run {TOOL} again with the same arguments: it goes on there'
            raise ConfigError(field, 'a finished profile', got, remedy)
        return cls.from_dict(raw.get('origin'), raw['fit'], str(path))

    @classmethod
    def from_dict(
        cls, origin: Any, fit: Any, source: str = 'latency_profile'
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
            surplus = float(fit.get('surplus', 0.0))
            _require(0 <= surplus < 1, f'surplus {surplus}')
            shape = [int(n) for n in origin['input_shape']]
            _require(len(shape) == 3 and min(shape) > 0, f'input_shape {shape}')
            names = origin.get('not_measured', ())
            _require(all(isinstance(n, str) for n in names), 'not_measured')
            positions = [layer.positions for layer in layers.values()]
            _require(all(0 < n < float('inf') for n in positions), 'positions')
            factors = [f for k in kinds.values() for part in k.factors for f in part]
            _require(all(f > 0 for f in factors), 'a factor of 0')
            _require(all(min(k.steps) > 0 for k in kinds.values()), 'a step below 1')
            for name, layer in layers.items():
                is_valid = layer.kind in kinds and layer.out_dim in (0, 1)
                _require(is_valid and len(layer.shape) > 1, name)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            got = f'{type(error).__name__}: {error}'
            remedy = f'write it again with {TOOL}'
            raise ConfigError(source, 'a latency profile', got, remedy) from None
        return cls(dict(origin), kinds, layers, surplus)

    def to_dict(self) -> dict[str, Any]:
        """Return what was fitted in plain types, as JSON holds it."""
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
            'surplus': self.surplus,
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
            where.append(counted(threads, 'thread'))
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


def read_profile(
    path: str | Path | None, asked: Sequence[str], shape: Sequence[int] | None
) -> LatencyProfile | None:
    """Read the profile of a run.

    Args:
        path: The file; None where the run has none.
        asked: What cannot be done without one.
        shape: Size (C, H, W) that the run counts costs for, if it names one.

    Raises:
        ConfigError: If it is needed and missing, damaged, or of another input size.
    """
    if path is None:
        if asked:
            expected = f'the file of a latency profile, for {asked[0]}'
            remedy = f'write one: python {TOOL} CONFIG --out table.json'
            raise ConfigError('latency_profile', expected, 'None', remedy)
        return None
    profile = LatencyProfile.load(path)
    if shape is not None and tuple(shape) != profile.input_shape:
        expected = f'{profile.input_shape}, the size that was profiled'
        remedy = f'profile this size with {TOOL}'
        raise ConfigError('input_shape', expected, repr(tuple(shape)), remedy)
    return profile


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
