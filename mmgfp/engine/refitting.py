"""Refitting in a training run: a decision, and at once what makes up for it.

What a decision takes leaves a hole that training would have to fill. Instead, layers
are refitted on training images (docs/compensation.md) and written back into the masked
model. Nothing of this is left for a checkpoint to hold: images and random numbers
follow from the seed of the run and the iteration alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.in_training import InTraining
from mmgfp.compensation.reports import Compensated, refitting_text
from mmgfp.config import PruningConfig
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.distributed import (
    broadcast_result,
    check_agreement,
    sum_over_processes,
)
from mmgfp.engine.recorded_losses import recorded_losses
from mmgfp.engine.runner_access import averaged_models, optimizer_of
from mmgfp.pruner import ChannelPruner, PruneStep
from mmgfp.surgery.expand import take_over
from mmgfp.surgery.live import with_inner
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import random_states_restored, seed_all

#: Batches that images are spread over at least, as some are held out.
LEAST_BATCHES = 8
#: Running means of gradients in the states of optimizers.
FIRST_MOMENTS = ('momentum_buffer', 'exp_avg')


def check_refitting(runner: Runner, config: PruningConfig) -> None:
    """Refuse training data of which no images can be drawn, where these are needed.

    Raises:
        ConfigError: If there are none that can be had by their number, or too few.
    """
    if config.compensation is None:
        return
    dataset = runner.train_dataloader.dataset
    size = 0 if isinstance(dataset, IterableDataset) else len(dataset)
    if size < 2:
        got = type(dataset).__name__ + (f' of {size} images' if size else '')
        expected = 'a dataset of two images or more with numbers, where compensate is'
        remedy = "use such a dataset, or compensate='none'"
        raise ConfigError('train_dataloader.dataset', expected, got, remedy)


def step_and_refit(
    runner: Runner, pruner: ChannelPruner, loss_scale: float
) -> PruneStep | None:
    """Take in an iteration; at a decision, refit what reads the units that went.

    Args:
        runner: The runner that trains the pruner's model.
        pruner: The pruner.
        loss_scale: The factor on the loss in backward.

    Returns:
        PruneStep: The outcome of a decision, or None between two decisions.

    Raises:
        StatisticsError: If processes decided differently.
    """
    decides = (pruner.iteration + 1) % pruner.config.interval == 0 and not pruner.done
    options = pruner.config.compensation if decides else None
    decision = _Decision.begin(runner, pruner, options) if options else None
    step = pruner.step(loss_scale, sum_over_processes())
    if step is not None:
        check_agreement(pruner.units.kept)
        if decision is not None and len(step.units):
            _refit(decision)
    return step


@dataclass(frozen=True)
class _Decision:
    """A decision to be made up for.

    Attributes:
        runner: The runner.
        pruner: Its pruner.
        options: How to make up for it.
        kept: Units that were kept before it, (U,).
        models: The model and its averages, which are refitted in place.
        before: What they were before it, compact; in the main process only.
    """

    runner: Runner
    pruner: ChannelPruner
    options: InTraining
    kept: np.ndarray
    models: Sequence[nn.Module]
    before: Sequence[nn.Module]

    @classmethod
    def begin(
        cls, runner: Runner, pruner: ChannelPruner, options: InTraining
    ) -> _Decision:
        """Return one that comes next, with what is there before it."""
        models = [pruner.model, *(a.module for a in averaged_models(runner))]
        before = [pruner.compact(m) for m in models] if is_main_process() else []
        return cls(runner, pruner, options, pruner.units.kept.copy(), models, before)


def _refit(decision: _Decision) -> None:
    """Refit the model and its averages, the same in all processes.

    An average is refitted on its own: its features are others than the model's, and it
    is what is validated and saved.
    """
    runner, pruner, models = decision.runner, decision.pruner, decision.models

    def compute() -> list[list[str]]:
        with random_states_restored(pruner.model):
            batches = _batches(decision)
            pairs = zip(models, decision.before, strict=True)
            return [_refit_one(decision, batches, *pair) for pair in pairs]

    changed = broadcast_result(compute)
    for model, names in zip(models, changed, strict=True):
        tensors = model.state_dict()
        for name in names if get_world_size() > 1 else ():
            broadcast(tensors[name])  # in place, bit for bit
    parameters = dict(pruner.model.named_parameters(remove_duplicate=False))
    refitted = [parameters[name] for name in changed[0] if name in parameters]
    forget_directions(optimizer_of(runner.optim_wrapper), refitted)


def _refit_one(
    decision: _Decision, batches: Sequence[Any], model: nn.Module, before: nn.Module
) -> list[str]:
    """Refit a model in place and return the names of the tensors that changed."""
    started = time.perf_counter()
    pruner, kept, options = decision.pruner, decision.kept, decision.options
    units, logger = pruner.units, decision.runner.logger
    result = compensate(
        before,
        units.grouping.remaining(kept),
        units.kept[kept],
        recorded_losses(before, batches),
        options.config,
    )
    changed = take_over(model, result.model, units.remaining_structure(units.kept))
    name = 'the model' if model is pruner.model else 'the averaged copy'
    seconds = time.perf_counter() - started
    logger.info(f'{name}: {_summary(result, options)}, {seconds:.1f} s')
    for layer in result.layers:
        if layer.reason is not None:
            logger.debug(f'{layer.layer} is not refitted: {layer.reason}')
    return changed


def _summary(result: Compensated, options: InTraining) -> str:
    """Return what became of the layers in one line."""
    parts = [refitting_text(result.layers)]
    if result.norms:
        parts.append(f'statistics of {len(result.norms)} batch norms moved')
    return f'{", ".join(parts)} (compensate={options.config.method!r})'


def _batches(decision: _Decision) -> list[Any]:
    """Return batches of training images, as the run loads them but in this process.

    The dataset is a copy, as some keep images for others to be mixed with. Random
    generators are left as they are after loading.
    """
    runner, model = decision.runner, decision.pruner.model
    loader = runner.train_dataloader
    dataset: Any = copy.deepcopy(loader.dataset)
    rng = np.random.default_rng([runner.seed, decision.pruner.iteration])
    chosen = rng.permutation(len(dataset))[: decision.options.images].tolist()
    # MMEngine lets some samplers make whole batches.
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    # Batch norm refuses a single image whose map has shrunk to one position; but there
    # must be two batches.
    size = min(size, max(len(chosen) // LEAST_BATCHES, min(2, len(chosen) // 2)))
    seed_all(int(rng.integers(2**32)))
    starts = range(0, len(chosen) - size + 1, size)
    batches = [
        loader.collate_fn([dataset[i] for i in chosen[s : s + size]]) for s in starts
    ]
    return [data for data in batches if not BatchCalls(model, data).without_boxes]


@torch.no_grad()
def forget_directions(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let an optimizer go on from parameters that were set to other values.

    Running means of gradients, and gradients that wait for a step, point to where the
    loss fell around the old values; they would carry the new ones away from the least
    squares that they solve. Running means of squares stay: they are about how steep the
    loss is, and without them the next steps would be of full size again.

    Args:
        optimizer: The optimizer, and those that it wraps.
        parameters: The parameters.
    """
    optimizers = with_inner(optimizer)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()
        for each in optimizers:
            state = each.state.get(parameter, {})
            for key in FIRST_MOMENTS:
                if state.get(key) is not None:
                    state[key].zero_()
