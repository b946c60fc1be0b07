"""The course of pruning in TensorBoard and its like, through MMEngine's visualizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.dist import master_only
from mmengine.visualization import Visualizer

from mmgfp.engine.artifact import costs_in_numbers
from mmgfp.pruner import ChannelPruner, PruneStep

#: Quantiles of importance that are plotted, by name.
QUANTILES = {'low': 0.1, 'median': 0.5, 'high': 0.9}


def plot_step(
    visualizer: Visualizer, pruner: ChannelPruner, step: PruneStep, iteration: int
) -> None:
    """Plot a pruning decision: scalars, and the channels left as a histogram.

    Args:
        visualizer: The runner's.
        pruner: The pruner.
        step: What it decided.
        iteration: Iterations of the run up to now.
    """
    units = pruner.units
    # First, as W&B takes everything up to the next scalars as one step.
    left = 1 - units.removed / units.sizes
    plot_histogram(visualizer, 'pruning/channels_left', left, iteration)
    visualizer.add_scalars(scalars_of(pruner, step), step=iteration)


def scalars_of(pruner: ChannelPruner, step: PruneStep) -> dict[str, float]:
    """Return costs, the way to each target, and importance, by the names of plots.

    Importance is that of the units that stay; its names are left out where the decision
    went by none.

    Args:
        pruner: The pruner.
        step: What it decided.
    """
    units = pruner.units
    scalars = {
        f'pruning/{cost}_{kind}': value
        for cost, kinds in costs_in_numbers(step.totals, units.full).items()
        for kind, value in kinds.items()
    }
    for target in pruner.config.targets:
        saved = 1 - step.totals.ratio(target.cost, units.full)
        scalars[f'pruning/way_to_{target.label}'] = min(saved / (1 - target.ratio), 1.0)
    if step.importance is not None:
        stay = step.importance[units.kept]
        if len(known := stay[np.isfinite(stay)]):
            values = np.quantile(known, [*QUANTILES.values()]).tolist()
            for name, value in zip(QUANTILES, values, strict=True):
                scalars[f'pruning/importance_{name}'] = value
    return scalars


@master_only
def plot_histogram(
    visualizer: Visualizer, name: str, values: np.ndarray, iteration: int
) -> None:
    """Plot a histogram in each backend that has some; MMEngine has scalars alone.

    Args:
        visualizer: The runner's.
        name: The name of the plot.
        values: What is counted.
        iteration: Iterations of the run up to now.
    """
    for backend in visualizer._vis_backends.values():
        experiment: Any = getattr(backend, 'experiment', None)
        if hasattr(experiment, 'add_histogram'):  # TensorBoard's SummaryWriter
            experiment.add_histogram(name, values, iteration)
        elif hasattr(experiment, 'Histogram'):  # the module wandb
            experiment.log({name: experiment.Histogram(values)}, commit=False)
