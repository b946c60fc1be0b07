"""How long it takes to find the coupled channels, with and without the proof."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Times, spread, stopwatch
from mmgfp.coupling import build_groups
from mmgfp.discovery import Discovery, discover
from mmgfp.fisher import untapped, weight_owners
from mmgfp.groups import Grouping
from mmgfp.recording import all_parameters_require_grad, undisturbed, watch_outputs
from mmgfp.surgery import has_attribute_rule
from mmgfp.tracing import RowUse, judge_rows, trace_loss, watch_rows, watch_widths


def find_groups(
    model: nn.Module, calls: Any, times: Times, device: str
) -> tuple[Grouping, RowUse]:
    """What `discover` finds before the proof; ``trace`` and ``groups`` are timed."""
    with ExitStack() as stack:
        for watch in (undisturbed(model), all_parameters_require_grad(model)):
            stack.enter_context(watch)
        layers = stack.enter_context(watch_rows(model))
        widths = stack.enter_context(watch_widths(model, has_attribute_rule))
        outputs = stack.enter_context(watch_outputs(model))
        loss = calls.loss(model)
        with stopwatch(times['trace'], device):
            trace = trace_loss(model, loss, False, widths, outputs)
    with stopwatch(times['groups'], device):
        use = judge_rows(layers)
        weights = [call.weight for call in trace.calls]
        unread = untapped(weights, weight_owners(model), use)
        grouping = build_groups(model, trace, (), unread)
    return grouping, use


def unproven(model: nn.Module, calls: Any) -> Discovery:
    """What `discover` finds, for parts in which the time of the proof is no matter."""
    device = next(model.parameters()).device.type
    grouping, use = find_groups(model, calls, {'trace': [], 'groups': []}, device)
    owned = {name for name, _ in model.named_parameters()}
    work = {n: w for n, w in calls.work(model).items() if n in owned}
    return Discovery(grouping, use, work)


def measure_discovery(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Seconds of the loss, of trace and groups after it, and of all with the proof.

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
        grouping, _ = find_groups(model, calls, times, device)
        if turn == 0:  # does not count
            for values in times.values():
                values.clear()
    with stopwatch(times['all'], device):
        work = calls.work(model)
        discover(model, calls.loss, calls.check, calls.images, work)
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
    rows = [['model', 'groups', 'units', *heads, 'all, with proof (s)']]
    for label, found in results.items():
        times = (found['seconds'][n]['wall']['median'] for n in names)
        counts = (str(found['groups']), str(found['units']))
        rows.append([label, *counts, *(f'{t:.2f}' for t in times)])
    return rows
