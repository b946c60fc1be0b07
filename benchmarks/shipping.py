"""Speed of exported pruned models in the runtimes that ship them.

Structures come from a few iterations of training, from the first values of the
weights, as in `benchmarks.latency`: they say what widths cost, not what trained models
lose. One-stage detectors are exported with raw outputs, two-stage ones with everything
from the image to the boxes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.discovering import unverified
from benchmarks.latency import ORIGINAL, prune
from mmgfp.export.graphs import end_to_end_graph, raw_graph
from mmgfp.runtimes import open_model
from mmgfp.runtimes.timing import ratios, spread, take_turns
from mmgfp.utils.trial_runs import copy_module

VARIANTS: dict[str, dict[str, Any]] = {
    '-M, divisor 1': {'normalize': 'memory', 'divisor': 1},
    '-M, divisor 8': {'normalize': 'memory', 'divisor': 8},
    '-F, divisor 8': {'normalize': 'flops', 'divisor': 8},
    '-F, divisor 16': {'normalize': 'flops', 'divisor': 16},
}
#: Those to half the latency that a profile predicts.
PROFILED: dict[str, dict[str, Any]] = {
    f'{name}, latency 50%': {
        'normalize': normalize,
        'divisor': 8,
        'target': {'latency': 0.5},
    }
    for name, normalize in (('-L', 'latency'), ('-M', 'memory'), ('-F', 'flops'))
}
SHARE = 0.5
RUNTIMES = ('torch', 'onnxruntime', 'openvino')


def measure_shipping(
    model: nn.Module,
    calls: Any,
    repeats: int,
    device: str,
    size: Sequence[int],
    profile: Path | None = None,
) -> dict[str, Any]:
    """Passes of pruned models over those of the original, by runtime.

    Args:
        model: The model in training mode.
        calls: Its loss, outputs and the size of images, as `BatchCalls` has them.
        repeats: Timed rounds.
        device: Where the model is; files run on the CPU.
        size: Size (C, H, W) of the image, for costs and times.
        profile: A latency profile of the model, for `PROFILED`.
    """
    discovery = replace(
        unverified(model, calls), profiles=dict(calls.profile(model, size))
    )
    models = {ORIGINAL: copy_module(model).eval()}
    points: dict[str, dict[str, Any]] = {ORIGINAL: {'macs': 1.0, 'memory': 1.0}}
    variants = dict(VARIANTS)
    if profile is not None:
        for variant, options in PROFILED.items():
            variants[variant] = {**options, 'latency_profile': str(profile)}
    for variant, options in variants.items():
        for share, costs, pruned in prune(
            copy_module(model), calls, discovery, options
        ):
            if share == SHARE:
                models[variant], points[variant] = pruned.eval(), costs
    image = torch.rand(1, *size)  # (1, C, H, W)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        passes = passes_of(models, image, Path(folder), threads)
        times = {
            runtime: take_turns(actions, repeats, device, twice=True)
            for runtime, actions in passes.items()
        }
    for name, point in points.items():
        point['ratio'] = {
            runtime: {
                clock: spread(ratios(measured, name, ORIGINAL, clock))
                for clock in ('wall', 'cpu')
            }
            for runtime, measured in times.items()
        }
        point['seconds'] = {
            runtime: spread([t['wall'] for t in measured[name]])
            for runtime, measured in times.items()
        }
    return {'points': points, 'threads': threads, 'times': times}


def passes_of(
    models: dict[str, nn.Module], image: torch.Tensor, folder: Path, threads: int
) -> dict[str, dict[str, Any]]:
    """Return what runs each model once, by runtime and model.

    Args:
        models: Models in eval mode.
        image: One image (1, C, H, W).
        folder: Where files are written.
        threads: Threads of a run.
    """
    passes: dict[str, dict[str, Any]] = {runtime: {} for runtime in RUNTIMES}
    for name, model in models.items():
        is_two_stage = hasattr(model, 'roi_head')
        graph = end_to_end_graph(model) if is_two_stage else raw_graph(model)
        path = folder / f'{len(passes["torch"])}.onnx'
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            torch.onnx.export(
                graph,
                (image,),
                path,
                dynamo=False,
                opset_version=17,
                input_names=['image'],
                output_names=list(graph.outputs),
            )
        passes['torch'][name] = partial(_without_gradients, graph, image)
        for runtime in RUNTIMES[1:]:
            session = open_model(path, runtime, threads)
            passes[runtime][name] = partial(session.run, {'image': image.numpy()})
    return passes


@torch.inference_mode()
def _without_gradients(graph: nn.Module, image: torch.Tensor) -> Any:
    return graph(image)


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page: how many times as fast as the original, by wall (CPU) time."""
    rows = [['model', 'variant', 'MACs', 'memory', 'predicted', *RUNTIMES]]
    for label, measured in results.items():
        for name, point in measured['points'].items():
            costs = [f'{point[cost]:.1%}' for cost in ('macs', 'memory')]
            costs.append(f'{point["latency"]:.1%}' if 'latency' in point else '')
            times = [_cell(name, point, runtime) for runtime in RUNTIMES]
            rows.append([label, name, *costs, *times])
    return rows


def _cell(name: str, point: dict[str, Any], runtime: str) -> str:
    """Milliseconds of the original, speed-ups of the others."""
    if name == ORIGINAL:
        return f'{point["seconds"][runtime]["median"] * 1e3:.4g} ms'
    wall, cpu = (point['ratio'][runtime][clock]['median'] for clock in ('wall', 'cpu'))
    return f'{1 / wall:.2f} × ({1 / cpu:.2f} ×)'
