"""Speed of pruned models, and the cost that tells it best (paper, figure 6).

There are no pretrained weights: statistics come from a few iterations of training, from
the first values of the weights, on made-up images. So the models say what channels
cost, not which of them trained models lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.discovering import unverified
from benchmarks.models import seeded, sgd, train_step
from mmgfp import GroupFisherPruner
from mmgfp.discovery.discover import Discovery
from mmgfp.runtimes.timing import ratio_text, ratios, spread, take_turns
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import copy_module

VARIANTS: dict[str, dict[str, Any]] = {
    '-M': {'normalize': 'memory'},
    '-F': {'normalize': 'flops'},
    '-U': {'normalize': 'none'},
    '-M, divisor 8': {'normalize': 'memory', 'divisor': 8},
}
TARGETS = [{'flops': 0.5}, {'flops': 0.25}]
#: Iterations to the last target, and from one decision to the next.
ITERATIONS, INTERVAL = 12, 2
LR = 1e-4
#: Timed passes of each model for each repeat, by images in a batch.
ROUNDS = {1: 4, 8: 1}
ORIGINAL = 'original'
COSTS = ('macs', 'memory')


def measure_latency(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Forward passes of pruned models over those of the original, and what goes along.

    Args:
        model: The model in training mode; its mode ``'tensor'`` has to do with images.
        calls: Its loss, outputs and the size of images, as `BatchCalls` has them.
        repeats: Timed rounds, times `ROUNDS`.
        device: Where the model is.
    """
    discovery = unverified(model, calls)
    models = {ORIGINAL: copy_module(model).eval()}
    points: dict[str, dict[str, Any]] = {ORIGINAL: dict.fromkeys(COSTS, 1.0)}
    for variant, options in VARIANTS.items():
        for share, costs, pruned in prune(
            copy_module(model), calls, discovery, options
        ):
            name = f'{variant}, {share:.0%}'
            models[name], points[name] = pruned.eval(), costs
    times = {}
    with torch.inference_mode():
        for batch, rounds in ROUNDS.items():
            inputs = torch.rand(batch, *calls.size, device=device)  # (N, C, H, W)
            passes: dict[str, Callable[[], Any]] = {
                name: partial(m, inputs, mode='tensor') for name, m in models.items()
            }
            rounds *= repeats
            times[str(batch)] = take_turns(passes, rounds, device, twice=True)
    for name, point in points.items():
        point['ratio'] = {
            batch: spread(ratios(measured, name, ORIGINAL, 'wall'))
            for batch, measured in times.items()
        }
        point['seconds'] = {
            batch: spread([t['wall'] for t in measured[name]])
            for batch, measured in times.items()
        }
    correlation = {batch: correlations([*points.values()], batch) for batch in times}
    wanted = [f'{name}, {t["flops"]:.0%}' for name in VARIANTS for t in TARGETS]
    return {
        'points': points,
        'missed': [name for name in wanted if name not in points],
        'correlation': correlation,
        'times': times,
    }


def prune(
    model: nn.Module, calls: Any, discovery: Discovery, options: dict[str, Any]
) -> Iterator[tuple[float, dict[str, Any], nn.Module]]:
    """Train and prune a model; what it is at each target.

    Args:
        model: Is masked in place.
        calls: Its loss on a batch.
        discovery: Its groups.
        options: Of the pruner.

    Yields:
        tuple: The target, the shares of costs that are left, and a compact copy.
    """
    pruner = GroupFisherPruner(
        model,
        interval=INTERVAL,
        iterations=ITERATIONS,
        **{'target': TARGETS, **options},
    )
    try:
        pruner.attach(discovery)
    except ConfigError:
        return  # a target is out of reach, as in steps of eight from few channels
    train = seeded(train_step(model, calls.loss, sgd(model, LR)))
    for _ in range(ITERATIONS):
        train()
        step = pruner.step()
        for target in step.reached if step else ():
            now, full = pruner.units.totals, pruner.units.full
            costs = {c: now.ratio(c, full) for c in (*COSTS, *pruner.config.costs)}
            yield target.ratio, costs, pruner.compact()


def correlations(points: Sequence[dict[str, Any]], batch: str) -> dict[str, float]:
    """Pearson's correlation of the latency with each cost, over all models.

    Args:
        points: The models, each with shares of costs and ratios of latency.
        batch: Images in the batch.
    """
    latency = [point['ratio'][batch]['median'] for point in points]
    return {
        cost: float(np.corrcoef([point[cost] for point in points], latency)[0, 1])
        for cost in COSTS
    }


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured and the variant."""
    batches = [f'batch {batch}' for batch in ROUNDS]
    rows = [['model', 'variant', 'MACs', 'memory', *batches]]
    for label, measured in results.items():
        for name, point in measured['points'].items():
            costs = (f'{point[cost]:.1%}' for cost in COSTS)
            times = (_latency(name, point, batch) for batch in measured['times'])
            rows.append([label, name, *costs, *times])
        for name in measured['missed']:
            rows.append([label, name, 'not reached', '', *[''] * len(batches)])
        for cost, word in zip(COSTS, ('MACs', 'memory'), strict=True):
            values = (f'{c[cost]:.3f}' for c in measured['correlation'].values())
            rows.append([label, f'correlation with {word}', '', '', *values])
    return rows


def _latency(name: str, point: dict[str, Any], batch: str) -> str:
    """Milliseconds of the original, ratios of the others."""
    if name == ORIGINAL:
        return f'{point["seconds"][batch]["median"] * 1e3:.4g} ms'
    return ratio_text(point['ratio'][batch])
