"""Time to find the coupled channels, with and without verification."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mmgfp.discovery.discover as discover_module
from mmgfp.criteria.fisher import Fisher
from mmgfp.discovery.discover import Discovery, discover, own_profiles, trace_model
from mmgfp.discovery.grouping import build_groups
from mmgfp.runtimes.timing import Times, spread, stopwatch, timed_calls


def unverified(model: nn.Module, calls: Any) -> Discovery:
    """Return the result of `discover` without the time that verification takes."""
    seen = trace_model(model, calls.loss)
    unscorable = Fisher().unscorable(model, seen.weights, seen.rows)
    grouping = build_groups(model, seen.trace, unscorable=unscorable)
    return Discovery(grouping, seen.rows, own_profiles(model, calls.profile(model)))


def measure_discovery(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Seconds of the loss, of trace and groups after it, and of all with verification.

    Args:
        model: The model in training mode.
        calls: Its loss and outputs on a batch, as `BatchCalls` has them.
        repeats: Timed rounds.
        device: Where the model is.
    """
    torch.manual_seed(0)
    times: Times = {'loss': [], 'trace': [], 'groups': [], 'all': []}
    for turn in range(1 + repeats):
        with stopwatch(times['loss'], device):
            calls.loss(model)
        with timed_calls(discover_module, 'trace_loss', times['trace'], device):
            seen = trace_model(model, calls.loss)
        with stopwatch(times['groups'], device):
            unscorable = Fisher().unscorable(model, seen.weights, seen.rows)
            grouping = build_groups(model, seen.trace, unscorable=unscorable)
        if turn == 0:  # does not count
            for values in times.values():
                values.clear()
    with stopwatch(times['all'], device):
        work = calls.profile(model)
        discover(model, calls.loss, calls.forward, calls.images, work)
    return {
        'groups': len(grouping.groups),
        'units': grouping.units,
        'seconds': {
            name: {c: spread([t[c] for t in times[name]]) for c in ('wall', 'cpu')}
            for name in times
        },
        'times': times,
    }


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured."""
    names = list(next(iter(results.values()))['seconds'])
    heads = [f'{name} (s)' for name in names[:-1]]
    rows = [['model', 'groups', 'units', *heads, 'all, with verification (s)']]
    for label, measured in results.items():
        times = (measured['seconds'][n]['wall']['median'] for n in names)
        counts = (str(measured['groups']), str(measured['units']))
        rows.append([label, *counts, *(f'{t:.2f}' for t in times)])
    return rows
