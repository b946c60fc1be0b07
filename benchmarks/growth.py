"""Growth of costs with the model and with the size of images."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.decision import PACES, decision_time, measure_decision
from benchmarks.discovering import measure_discovery
from benchmarks.step import compare_steps, every_step, ratio_cell

#: Timed rounds of discovery and of decisions, at most: their times scatter little.
FEW = 2


def measure_growth(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """The ratio of steps, and the times of discovery and of decisions.

    Args:
        model: The model in training mode.
        calls: Its loss and outputs on a batch, as `BatchCalls` has them.
        repeats: Timed rounds of steps.
        device: Where the model is.
    """
    few = min(repeats, FEW)
    discovery = measure_discovery(model, calls, few, device)
    with every_step(model, calls) as (actions, _):
        del actions['between']
        step = compare_steps(actions, repeats, device)
    decision = measure_decision(model, calls, few, device)
    return {'discovery': discovery, 'step': step, 'decision': decision}


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured."""
    heads = ['trace and groups (s)', 'with verification (s)', 'one unit (ms)']
    heads += ['ten units (ms)', 'auto (ms)']
    rows = [['model', 'units', 'plain (s)', 'pruning', *heads]]
    for label, measured in results.items():
        step, discovery = measured['step'], measured['discovery']
        seconds = {n: t['wall']['median'] for n, t in discovery['seconds'].items()}
        rows.append(
            [
                label,
                str(discovery['units']),
                f'{step["seconds"]["plain"]["median"]:.3g}',
                ratio_cell(step['ratio']['pruning']),
                f'{seconds["trace"] + seconds["groups"]:.2f}',
                f'{seconds["all"]:.2f}',
                *(decision_time(measured['decision'], name) for name in PACES),
            ]
        )
    return rows
