"""Times of a network's layers in a runtime, measured while the whole network runs."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.latency.graph import export_marked, times_of_layers
from mmgfp.runtimes import open_model
from mmgfp.runtimes.base import require
from mmgfp.runtimes.onnx_runtime import session_options
from mmgfp.runtimes.open_vino import cpu_options, shared_core
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import is_layer
from mmgfp.utils.registry import Registry

#: Seconds for each kind of measurement of one network, and how often it runs in them.
BUDGET = 0.5
RUNS = (3, 100)


@dataclass(frozen=True)
class Piece:
    """A part of a network that is run as one.

    Attributes:
        module: A module that holds the whole model as ``model``.
        inputs: What it is called with.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]


#: Milliseconds by the name of each weight; they add up to the time of the whole.
LayerTimes = dict[str, float]


class LayerTimer(ABC):
    """Measures networks in one runtime.

    Args:
        threads: Threads that a run may use.
        device: ``'cpu'`` or ``'cuda'``.

    Attributes:
        name: Name of the runtime.
        package: The package whose version counts.
        devices: Devices on which it measures.

    Raises:
        ConfigError: If it does not measure on that device.
    """

    name = 'torch'
    package = 'torch'
    devices: tuple[str, ...] = ('cpu',)

    def __init__(self, threads: int = 1, device: str = 'cpu') -> None:
        if device not in self.devices:
            raise ConfigError(
                '--device',
                f'one that {type(self).__name__} is measured on: '
                f'{", ".join(self.devices)}',
                device,
                'name another device or runtime',
            )
        if device == 'cuda' and not torch.cuda.is_available():
            remedy = 'run it on the machine that the model is for'
            raise ConfigError('--device', 'one that is here', device, remedy)
        self.threads = threads
        self.device = device

    @property
    def version(self) -> str:
        """Version of the runtime."""
        return importlib.metadata.version(self.package)

    @abstractmethod
    def measure(self, piece: Piece) -> LayerTimes:
        """Return the time of each layer with what follows it."""

    def scaled(self, times: LayerTimes, seconds: float) -> LayerTimes:
        """Return shares of the time of the whole, in milliseconds.

        Args:
            times: Times of the layers, of any unit, while they were watched.
            seconds: Time of the whole when nobody watches.
        """
        factor = 1e3 * seconds / sum(times.values())
        return {_parameter(name): t * factor for name, t in times.items()}

    def clock(self) -> float:
        """Seconds of this process on one thread, which other processes do not add to.

        With several threads, it is what a watch shows.
        """
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def lowest(self, run: Callable[[], Any]) -> float:
        """Return the seconds of a run that was disturbed least."""
        run()
        seconds: list[float] = []
        while len(seconds) < RUNS[0] or (
            sum(seconds) < BUDGET and len(seconds) < RUNS[1]
        ):
            began = self.clock()
            run()
            seconds.append(self.clock() - began)
        return min(seconds)


def _parameter(name: str) -> str:
    """Return the model's own name of a piece's parameter."""
    return name.removeprefix('model.')


#: Timers by the name of the runtime.
TIMERS: Registry[LayerTimer] = Registry('runtime')


def _runs(seconds: float) -> int:
    """Return how often to run something that takes so long."""
    return int(np.clip(BUDGET / max(seconds, 1e-6), *RUNS))


@TIMERS.register('onnxruntime', 'ort')
class OnnxTimer(LayerTimer):
    """onnxruntime's own profiler, on the CPU."""

    name = package = 'onnxruntime'

    def measure(self, piece: Piece) -> LayerTimes:
        """Return the time of each layer with what follows it."""
        ort = require('onnxruntime', 'onnx')
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'model.onnx')
            owners = export_marked(piece.module, piece.inputs, path)
            session = open_model(path, 'onnxruntime', self.threads)
            arrays = [t.numpy() for t in piece.inputs]
            # Inputs that nothing reads are not in the file.
            names = [f'input{i}' for i in range(len(arrays))]
            feed = {
                n: a for n, a in zip(names, arrays, strict=True) if n in session.inputs
            }
            seconds = self.lowest(lambda: session.run(feed))
            options = session_options(self.threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, 'profile'))
            watched = ort.InferenceSession(
                str(path), options, providers=['CPUExecutionProvider']
            )
            for _ in range(_runs(seconds) + 1):
                watched.run(None, feed)
            events = json.loads(Path(watched.end_profiling()).read_text())
        return self.scaled(times_of_layers(_least_durations(events), owners), seconds)


def _least_durations(events: Sequence[Any]) -> list[tuple[str, str, float]]:
    """Return name, op and shortest time of each node, in order of the first run."""
    kernels = [e for e in events if e.get('name', '').endswith('_kernel_time')]
    nodes: dict[tuple[str, Any], tuple[str, float]] = {}
    for event in kernels:
        name = event['name'].removesuffix('_kernel_time')
        key = (name, event['args'].get('node_index'))
        op, duration = event['args'].get('op_name', ''), float(event['dur'])
        nodes[key] = (op, min(duration, nodes.get(key, (op, np.inf))[1]))
    return [(name, op, time) for (name, _), (op, time) in nodes.items()]


@TIMERS.register('openvino', 'ov')
class OpenVINOTimer(LayerTimer):
    """OpenVINO's own counters, on the CPU."""

    name = package = 'openvino'

    def measure(self, piece: Piece) -> LayerTimes:
        """Return the time of each layer with what follows it."""
        core = shared_core()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'model.onnx')
            owners = export_marked(piece.module, piece.inputs, path)
            options = cpu_options(self.threads)
            requests = [
                core.compile_model(str(path), 'CPU', more).create_infer_request()
                for more in (options, options | {'PERF_COUNT': 'YES'})
            ]
        plain, watched = requests
        names = {n for port in plain.model_inputs for n in port.names}
        feed = {
            f'input{i}': t.numpy()
            for i, t in enumerate(piece.inputs)
            if f'input{i}' in names
        }
        seconds = self.lowest(lambda: plain.infer(feed, share_inputs=True))
        least: dict[tuple[int, str], tuple[str, float]] = {}
        for _ in range(_runs(seconds) + 1):
            watched.infer(feed, share_inputs=True)
            for i, info in enumerate(watched.profiling_info):
                key, duration = (i, info.node_name), info.real_time.total_seconds()
                shortest = min(duration, least.get(key, ('', np.inf))[1])
                least[key] = (info.node_type, shortest)
        events = [(name, op, time) for (_, name), (op, time) in least.items()]
        return self.scaled(times_of_layers(events, owners), seconds)


@TIMERS.register('torch', 'pytorch')
class TorchTimer(LayerTimer):
    """PyTorch's own modules; what lies between two layers is the first one's."""

    devices = ('cpu', 'cuda')

    def measure(self, piece: Piece) -> LayerTimes:
        """Return the time of each layer with what follows it."""
        torch.set_num_threads(self.threads)
        module = piece.module.to(self.device)
        inputs = [t.to(self.device) for t in piece.inputs]

        def run() -> None:
            module(*inputs)
            if self.device == 'cuda':
                torch.cuda.synchronize()

        with torch.inference_mode():
            seconds = self.lowest(run)
            runs = [self._watch(module, run) for _ in range(_runs(seconds))]
        names = [name for name, _ in runs[0]]
        least = np.array([[t for _, t in r] for r in runs]).min(0)
        times: dict[str, float] = {}
        for name, duration in zip(names, least.tolist(), strict=True):
            times[name] = times.get(name, 0.0) + duration
        return self.scaled(times, seconds)

    def clock(self) -> float:
        """Return the process' seconds, or what a watch shows where a GPU works."""
        return time.perf_counter() if self.device == 'cuda' else super().clock()

    def _watch(
        self, module: nn.Module, run: Callable[[], None]
    ) -> list[tuple[str, float]]:
        """Run once; return the time from each layer's start to the next one's."""
        starts: list[tuple[str, Any]] = []
        owners = {n.rpartition('.')[0]: n for n, _ in module.named_parameters()}
        handles = [
            layer.register_forward_pre_hook(
                lambda m, a, weight=f'{name}.weight': starts.append(
                    (weight, self._mark())
                )
            )
            for name, layer in module.named_modules()
            if is_layer(layer) and name in owners
        ]
        try:
            began = self._mark()
            run()
            ended = self._mark()
        finally:
            for handle in handles:
                handle.remove()
        marks = [began, *(mark for _, mark in starts[1:]), ended]
        spans = [self._span(*pair) for pair in zip(marks, marks[1:], strict=False)]
        return [(name, t) for (name, _), t in zip(starts, spans, strict=True)]

    def _mark(self) -> Any:
        if self.device != 'cuda':
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _span(self, start: Any, end: Any) -> float:
        if self.device != 'cuda':
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
