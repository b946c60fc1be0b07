"""Cost of an iteration: plain training against training that is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.discovering import unverified
from benchmarks.models import seeded, train_step
from benchmarks.traffic import bytes_moved, peak_bytes
from mmgfp import GroupFisherPruner
from mmgfp.runtimes.timing import ratio_text, ratios, spread, take_turns

Loss = Callable[[nn.Module], Tensor]
NEVER = 10**9


def pruned_step(model: nn.Module, calls: Any) -> tuple[Callable[[], None], Any]:
    """One iteration as the hook has it, one unit of each group masked; its pruner."""
    pruner = GroupFisherPruner(model, interval=NEVER)
    pruner.attach(unverified(model, calls))
    pruner.units.prune(np.unique(pruner.units.group_of, return_index=True)[1])
    train = train_step(model, calls.loss)

    def step() -> None:
        train()
        pruner.step()

    return step, pruner


def measure_step(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Times, peak memory and bytes moved of a step, plain, pruning and between.

    Between are iterations without statistics, as `statistics_interval` leaves them.

    Args:
        model: The model in training mode.
        calls: Its loss and outputs on a batch, as `BatchCalls` has them.
        repeats: Timed rounds, in which all take turns.
        device: Where the model is.
    """
    with every_step(model, calls) as (actions, pruner):
        both = {name: actions[name] for name in ('plain', 'pruning')}
        return {
            'layers': len(pruner.criterion.layers),
            'units': pruner.units.grouping.units,
            **compare_steps(actions, repeats, device),
            'bytes_moved': {name: bytes_moved(step) for name, step in both.items()},
            'peak_bytes': {n: peak_bytes(s, model, device) for n, s in both.items()},
        }


@contextmanager
def every_step(
    model: nn.Module, calls: Any
) -> Iterator[tuple[dict[str, Callable[[], None]], GroupFisherPruner]]:
    """The steps by name, and the pruner, which is closed in the end."""
    plain = seeded(train_step(copy.deepcopy(model), calls.loss))
    step, pruner = pruned_step(model, calls)
    pruning = seeded(step)

    def between() -> None:
        pruner.criterion.watch(False)
        pruning()

    try:
        yield {'plain': plain, 'pruning': pruning, 'between': between}, pruner
    finally:
        pruner.close()


def compare_steps(
    actions: Mapping[str, Callable[[], None]], repeats: int, device: str
) -> dict[str, Any]:
    """Times of steps that take turns, and their ratios to ``plain``."""
    times = take_turns(actions, repeats, device)
    return {
        'seconds': {n: spread([t['wall'] for t in times[n]]) for n in actions},
        'ratio': {
            name: {c: spread(ratios(times, name, 'plain', c)) for c in ('wall', 'cpu')}
            for name in actions
            if name != 'plain'
        },
        'times': times,
    }


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured."""
    rows = [['model', 'plain (s)', 'pruning', 'between', 'peak memory', 'bytes moved']]
    for label, measured in results.items():
        rows.append(
            [
                label,
                f'{measured["seconds"]["plain"]["median"]:.3g}',
                *(ratio_cell(measured['ratio'][n]) for n in ('pruning', 'between')),
                *(
                    f'× {measured[k]["pruning"] / measured[k]["plain"]:.3f}'
                    for k in ('peak_bytes', 'bytes_moved')
                ),
            ]
        )
    return rows


def ratio_cell(measured: dict[str, dict[str, float]]) -> str:
    """The ratio of wall times with the quartiles, and that of CPU times."""
    cpu = measured['cpu']['median']
    return f'{ratio_text(measured["wall"])}; CPU time × {cpu:.3f}'
