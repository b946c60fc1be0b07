"""What an iteration costs: plain training against training that is pruned."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models import train_step
from benchmarks.timing import ratios, spread, take_turns
from benchmarks.traffic import bytes_moved, peak_bytes
from mmgfp import GroupFisherPruner

Loss = Callable[[nn.Module], Tensor]
NEVER = 10**9


def pruned_step(model: nn.Module, calls: Any) -> tuple[Callable[[], None], Any]:
    """One iteration as the hook has it, one unit of each group masked; its pruner."""
    pruner = GroupFisherPruner(model, interval=NEVER)
    pruner.prepare(calls.loss, calls.check, calls.images, calls.work(model))
    pruner.alive[np.unique(pruner.grouping.group_of, return_index=True)[1]] = False
    pruner.mask.update(pruner.alive)
    train = train_step(model, calls.loss)

    def step() -> None:
        train()
        pruner.step()

    return step, pruner


def measure_step(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Times, peak memory and bytes moved of a step, plain, pruning and between.

    Between are iterations without statistics, as `statistics_every` leaves them.

    Args:
        model: The model in training mode.
        calls: Its loss and outputs on a batch, as `BatchCalls` has them.
        repeats: Timed rounds, in which all take turns.
        device: Where the model is.
    """
    plain = seeded(train_step(copy.deepcopy(model), calls.loss))
    step, pruner = pruned_step(model, calls)
    pruning = seeded(step)

    def between() -> None:
        pruner.tap.active = False
        pruning()

    actions = {'plain': plain, 'pruning': pruning, 'between': between}
    times = take_turns(actions, repeats, device)
    moved = {name: bytes_moved(actions[name]) for name in ('plain', 'pruning')}
    peaks = {n: peak_bytes(actions[n], model, device) for n in ('plain', 'pruning')}
    pruner.close()
    return {
        'layers': len(pruner.tap.layers),
        'units': pruner.grouping.units,
        'seconds': {n: spread([t['wall'] for t in times[n]]) for n in actions},
        'ratio': {
            name: {c: spread(ratios(times, name, 'plain', c)) for c in ('wall', 'cpu')}
            for name in ('pruning', 'between')
        },
        'peak_bytes': peaks,
        'bytes_moved': moved,
        'times': times,
    }


def seeded(work: Callable[[], None]) -> Callable[[], None]:
    """The same random choices each time: all steps sample the same RoIs."""

    def run() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        work()

    return run


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured."""
    rows = [['model', 'plain (s)', 'pruning', 'between', 'peak memory', 'bytes moved']]
    for label, found in results.items():
        rows.append(
            [
                label,
                f'{found["seconds"]["plain"]["median"]:.3g}',
                *(_ratio(found['ratio'][n]) for n in ('pruning', 'between')),
                *(
                    f'× {found[k]["pruning"] / found[k]["plain"]:.3f}'
                    for k in ('peak_bytes', 'bytes_moved')
                ),
            ]
        )
    return rows


def _ratio(found: dict[str, dict[str, float]]) -> str:
    wall, cpu = found['wall'], found['cpu']
    return (
        f'× {wall["median"]:.3f} ({wall["low"]:.3f} to {wall["high"]:.3f}); '
        f'CPU time × {cpu["median"]:.3f}'
    )
