"""Latency of several models on the CPU by runtime, measured in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmgfp.export.graphs import raw_graph
from mmgfp.export.onnx_file import write_onnx
from mmgfp.export.options import ExportOptions
from mmgfp.report.quantities import PROCESSOR, ratio_key
from mmgfp.runtimes import open_model
from mmgfp.runtimes.base import require
from mmgfp.runtimes.timing import Times, ratios, spread, take_turns
from mmgfp.utils.steps import begin_step

#: Turns that are not counted: allocators and kernel caches fill during them.
WARMUP = 3
Actions = dict[str, Callable[[], Any]]


def measure_runtimes(
    models: Mapping[str, nn.Module],
    infer: Callable[[nn.Module], Any],
    size: Sequence[int],
    rounds: int,
) -> tuple[dict[str, dict[str, float]], str | None]:
    """Time forward passes of several models in PyTorch and in onnxruntime.

    All of them take turns in one process. Each turn times a second pass, because the
    first one allocates memory and picks kernels for shapes that differ from those of
    the model before.

    Args:
        models: Models in eval mode by name, on the CPU.
        infer: Calls the given model on a batch in PyTorch.
        size: (N, C, H, W) of that batch, for which the models are exported.
        rounds: Timed passes of each model, at least 1.

    Returns:
        By key and by name, and why onnxruntime is not among them, None if it is. Keys
        in `mmgfp.report.quantities` give the median milliseconds for the batch. Keys
        that end in ``_ratio`` instead of ``_ms`` give the median ratio to the first
        model in the same round: what slows a whole round cancels out.
    """
    actions: dict[str, Actions] = {}
    actions['latency_ms'] = {n: partial(infer, m) for n, m in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        exported, reason = _exported(models, size, Path(folder))
        if reason is None:
            actions['onnxruntime_ms'] = exported
        flat = {(key, n): a for key, by in actions.items() for n, a in by.items()}
        names = {f'{key} {n}': action for (key, n), action in flat.items()}
        begin_step(f'timing {len(models)} models in turn, {rounds} rounds')
        with torch.inference_mode():
            times = take_turns(names, rounds, 'cpu', WARMUP, twice=True)
    clocks = {key: (key, 'wall') for key in actions}
    clocks |= {k: (key, 'cpu') for k, key in PROCESSOR.items() if key in actions}
    found: dict[str, dict[str, float]] = {}
    for entry, (key, clock) in clocks.items():
        runs = {name: f'{key} {name}' for name in actions[key]}
        first = next(iter(runs.values()))
        found[entry] = {
            name: milliseconds(times, run, clock)['median']
            for name, run in runs.items()
        }
        found[ratio_key(entry)] = {
            name: spread(ratios(times, run, first, clock))['median']
            for name, run in runs.items()
        }
    return found, reason


def _exported(
    models: Mapping[str, nn.Module], size: Sequence[int], folder: Path
) -> tuple[Actions, str | None]:
    """Export models and return runs of the files, or the reason why there are none."""
    actions: Actions = {}
    image = torch.rand(*size)
    try:
        require('onnxruntime', 'onnx')
        for number, (name, model) in enumerate(models.items()):
            begin_step(f'writing ONNX of the {name} model to time it')
            path = folder / f'{number}.onnx'
            graph = raw_graph(model, image)
            write_onnx(path, graph, image, ExportOptions(), {})
            session = open_model(path, 'onnxruntime', torch.get_num_threads())
            actions[name] = partial(session.run, {'image': image.numpy()})
    except Exception as error:  # exporters and runtimes raise many kinds
        words = ' '.join(str(error).split())[:200]
        return {}, f'no time in onnxruntime: {type(error).__name__}: {words}'
    return actions, None


def milliseconds(times: Times, name: str, clock: str = 'wall') -> dict[str, float]:
    """The median milliseconds of something with the quartiles around it.

    Examples:
        >>> seconds = [{'wall': s, 'cpu': s} for s in (0.001, 0.002, 0.004)]
        >>> milliseconds({'model': seconds}, 'model')['median']
        2.0
    """
    return spread([time[clock] * 1e3 for time in times[name]])
