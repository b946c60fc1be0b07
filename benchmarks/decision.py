"""Cost of a decision: the choice of units, and the masks that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

import mmgfp.units as units_module
from benchmarks.step import pruned_step
from mmgfp import GroupFisherPruner
from mmgfp.config import PruningConfig
from mmgfp.runtimes.timing import Times, ratios, spread, take_turns, timed_calls
from mmgfp.selection.schedules import build_schedule

#: Units that go at once, by the names that tables have for it.
PACES: dict[str, int | str] = {'one': 1, 'ten': 10, 'auto': 'auto'}
#: Decisions of each kind for each repeat, as they take milliseconds.
ROUNDS = 10


def measure_decision(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Seconds of a decision for one unit, ten units and as many as are safe.

    All begin with the statistics of one iteration and one unit of each group masked,
    so that every layer has its mask.

    Args:
        model: The model in training mode.
        calls: Its loss and outputs on a batch, as `BatchCalls` has them.
        repeats: Tenths of the timed rounds.
        device: Where the model is.
    """
    step, decider = pruned_step(model, calls)
    step()
    decider.config = PruningConfig.of(decider.config, interval=1)
    selection: Times = {name: [] for name in PACES}
    units: dict[str, int] = {}
    actions = {
        name: _decide(decider, name, selection[name], units, device) for name in PACES
    }
    rounds = ROUNDS * repeats
    times = take_turns(actions, rounds, device, before=_rewind(decider))
    selection = {name: measured[-rounds:] for name, measured in selection.items()}
    decider.close()
    return {
        'groups': len(decider.units.grouping.groups),
        'units': decider.units.grouping.units,
        'picked': units,
        'seconds': {n: spread([t['wall'] for t in times[n]]) for n in PACES},
        'selection': {n: spread([t['wall'] for t in selection[n]]) for n in PACES},
        'ratio': {n: spread(ratios(times, n, 'one', 'wall')) for n in PACES},
        'times': times,
    }


def _decide(
    decider: GroupFisherPruner,
    name: str,
    selection: list[dict[str, float]],
    units: dict[str, int],
    device: str,
) -> Callable[[], None]:
    """A decision at one of the `PACES`; says how many units go."""

    def run() -> None:
        decider.schedule = build_schedule(None, PACES[name], None)
        with timed_calls(units_module, 'select_units', selection, device):
            step = decider.step()
        assert step is not None
        units[name] = len(step.units)

    return run


def _rewind(decider: GroupFisherPruner) -> Callable[[], None]:
    """Brings the pruner back to where it stands now."""
    kept, statistics = (
        decider.units.kept.copy(),
        decider.criterion.statistics.state_dict(),
    )

    def run() -> None:
        decider.units.kept = kept.copy()
        decider.reached = ()
        decider.units.prune(np.flatnonzero(~kept))
        decider.criterion.statistics.load_state_dict(statistics)

    return run


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured."""
    heads = ['one unit (ms)', 'ten units (ms)', 'auto (ms)', 'units under auto']
    rows = [['model', 'groups', 'units', *heads]]
    for label, measured in results.items():
        counts = (str(measured['groups']), str(measured['units']))
        times = (decision_time(measured, name) for name in PACES)
        rows.append([label, *counts, *times, str(measured['picked']['auto'])])
    return rows


def decision_time(measured: dict[str, Any], name: str) -> str:
    """Milliseconds of a decision with the quartiles, and of selection in it."""
    low, middle, high = (
        f'{measured["seconds"][name][k] * 1e3:.3g}' for k in ('low', 'median', 'high')
    )
    selection = measured['selection'][name]['median'] * 1e3
    return f'{middle} ({low} to {high}); selection {selection:.3g}'
