"""How long models take, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

WARMUP = 3


def measure_latency(
    models: Mapping[str, nn.Module],
    infer: Callable[[nn.Module], Any],
    rounds: int = 20,
) -> dict[str, float]:
    """Times forward passes of several models on one input.

    The models take turns, so that whatever else the machine does meets them
    all, and the median drops the passes it met hardest. Of each turn a second pass is
    timed: the first one has to get memory and kernels for shapes that are not those of
    the model before.

    Args:
        models: Models in eval mode by name, all on one device.
        infer: Calls the model it is given on a batch on that device.
        rounds: Timed passes for each model, at least 1.

    Returns:
        Median milliseconds for the batch by name.
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
    """Returns seconds, after the device has finished what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
