"""Latency of several models, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

#: Turns that are not counted: allocators and kernel caches fill during them.
WARMUP = 3


def measure_latency(
    models: Mapping[str, nn.Module],
    infer: Callable[[nn.Module], Any],
    rounds: int = 20,
) -> dict[str, float]:
    """Time forward passes of several models on one input.

    The models take turns, so that other load on the machine affects all of them, and
    the median discards the passes it affected most. Each turn times a second pass,
    because the first one allocates memory and picks kernels for shapes that differ from
    those of the model before.

    Args:
        models: Models in eval mode by name, all on one device.
        infer: Calls the given model on a batch on that device.
        rounds: Timed passes for each model, at least 1.

    Returns:
        Median milliseconds for the batch by name.

    Examples:
        >>> models = {'wide': nn.Linear(64, 64), 'narrow': nn.Linear(64, 8)}
        >>> batch = torch.zeros(4, 64)
        >>> times = measure_latency(models, lambda model: model(batch), rounds=3)
        >>> list(times)
        ['wide', 'narrow']
    """
    device = next(p.device for m in models.values() for p in m.parameters())
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(WARMUP + rounds):
            for name, model in models.items():
                infer(model)
                began = _now(device)
                infer(model)
                if turn >= WARMUP:
                    times[name].append((_now(device) - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its queue."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
