"""Pruning without training: statistics, a cut, refitting, and again if it is far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.compensation.compensate import LayerReport, compensate
from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.recording import evaluating
from mmgfp.config import PruningConfig
from mmgfp.pruner import ChannelPruner, PruneStep
from mmgfp.selection.costs import LayerProfile, Totals
from mmgfp.selection.targets import Target
from mmgfp.surgery.compact import compact
from mmgfp.surgery.expand import take_over
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import (
    Forward,
    LossFunction,
    all_parameters_require_grad,
    copy_module,
    undisturbed,
    without_checkpointing,
)

#: One cut may leave this share of a cost; for less, there are several.
ONE_CUT = 0.45
#: The share that each of several cuts leaves, or a little more.
STEP = 0.75


@dataclass(frozen=True)
class Round:
    """One cut, and how the model was made up for it.

    Attributes:
        target: Where the cut ended.
        totals: Costs that remain.
        units: Numbers of the units that went.
        layers: What became of the layers that the cut reaches; empty without
            compensation.
        norms: Batch norms whose statistics were taken anew.
    """

    target: Target
    totals: Totals
    units: np.ndarray
    layers: tuple[LayerReport, ...] = ()
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pruned:
    """A model that was pruned without training.

    Attributes:
        model: The compact model.
        structure: What it keeps of the original.
        full: Costs of the original.
        rounds: All cuts, the last one to the target.
    """

    model: nn.Module
    structure: PruneStructure
    full: Totals
    rounds: tuple[Round, ...]

    @property
    def totals(self) -> Totals:
        """Costs of the compact model."""
        return self.rounds[-1].totals


def stations(ratio: float, rounds: int | Sequence[float] | None = None) -> list[float]:
    """Return the shares of a cost at which cuts end, falling, down to a target.

    Args:
        ratio: The target.
        rounds: The number of cuts, or the shares before the last one; by default one
            cut down to about half, and for less several of about a quarter each.

    Raises:
        ConfigError: If shares do not fall from 1 to the target.

    Examples:
        >>> stations(0.5)
        [0.5]
        >>> [round(share, 3) for share in stations(0.35)]
        [0.769, 0.592, 0.455, 0.35]
        >>> stations(0.35, [0.7, 0.5])
        [0.7, 0.5, 0.35]
    """
    if rounds is None:
        rounds = 1
        if ratio < ONE_CUT:
            rounds = math.ceil(math.log(ratio) / math.log(STEP))
    if isinstance(rounds, int):
        if rounds < 1:
            expected = 'a whole number of at least 1, or shares'
            raise ConfigError('rounds', expected, repr(rounds), 'give 1')
        return [ratio ** (k / rounds) for k in range(1, rounds)] + [ratio]
    shares = [*rounds, ratio]
    if not all(a > b for a, b in zip([1.0, *shares], shares, strict=False)):
        expected = f'shares that fall from below 1 to above {ratio:g}'
        raise ConfigError('rounds', expected, repr(rounds), 'leave them out')
    return shares


def prune_without_training(
    model: nn.Module,
    losses: Sequence[LossFunction],
    forward: Forward,
    images: int,
    config: PruningConfig | Mapping[str, Any] | None = None,
    compensation: CompensationConfig | None = None,
    rounds: int | Sequence[float] | None = None,
    profiles: Mapping[str, LayerProfile] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Pruned:
    """Prune a trained model by statistics of some batches, and refit what remains.

    In each round the criterion scores the units by all batches, one decision takes the
    lowest, and the layers that read them are refitted; the next one scores the result.

    Args:
        model: The trained model; it is left as it is.
        losses: Compute the loss of a model in eval mode, a scalar, on one batch each,
            always the same one.
        forward: Returns all outputs that the module it is given has at inference.
        images: Number of images in the batch of ``forward`` and the first loss.
        config: What may go, by which criterion, to which target; not the pace.
        compensation: How layers are refitted; None leaves the model as cut.
        rounds: See `stations`.
        profiles: How often each layer uses its weight for one image; recorded from
            ``forward`` if not given.
        report: Called with a line on what begins.

    Raises:
        ConfigError: If there are several targets, or one that cannot be reached.
        TraceError: If nothing can be pruned.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
        >>> losses = [lambda m, x=x: m(x).square().mean() for x in batches]
        >>> result = prune_without_training(net, losses, lambda m: m(batches[0]), 2)
        >>> result.model[0].out_channels
        4
    """
    work = copy_module(model)  # it is masked, and takes over what is refitted
    pruner = ChannelPruner(work, _at_once(PruningConfig.of(config), rounds, losses))
    # Else frozen stages cut the graph.
    with closing(pruner), evaluating(work), all_parameters_require_grad(work):
        report('finding coupled channels')
        pruner.prepare(losses[0], forward, images, profiles)
        return _all_rounds(model, pruner, losses, compensation, report)


def _all_rounds(
    model: nn.Module,
    pruner: ChannelPruner,
    losses: Sequence[LossFunction],
    compensation: CompensationConfig | None,
    report: Callable[[str], None],
) -> Pruned:
    """Prune the model of a pruner to all of its targets, and refit after each."""
    units, small = pruner.units, model
    done: list[Round] = []
    while not pruner.done:
        before = units.kept.copy()
        report(f'scoring units for {pruner.pending[0].label}')
        step = _decide(pruner, losses)
        facts = (step.reached[-1], step.totals, step.units)
        if compensation is None:
            small = compact(model, units.structure())
            done.append(Round(*facts))
            continue
        report('refitting')
        grouping = units.grouping.remaining(before)
        kept = units.kept[before]
        result = compensate(small, grouping, kept, losses, compensation)
        small = result.model
        take_over(pruner.model, small, units.structure())
        done.append(Round(*facts, result.layers, result.norms))
    return Pruned(small, units.structure(), units.full, tuple(done))


def output_losses(
    model: nn.Module, forwards: Sequence[Forward], seed: int = 0
) -> list[LossFunction]:
    """Return losses for images without labels: the distance to the model's own outputs.

    A distance has no gradient where it is zero. Instead, each loss is a sum of outputs
    with random signs: its squared gradient is on average the curvature of the squared
    distance, each tensor's as a share of its own square (Hutchinson's estimate of a
    Gauss-Newton diagonal; Martens and Grosse, 2015, arXiv 1503.05671, section 2).

    Args:
        model: The unpruned model; it is left as it is.
        forwards: Return all outputs that a model has for one batch each, always the
            same one. They have the same shapes for the compact model.
        seed: Number from which signs are drawn.

    Examples:
        >>> net, x = nn.Linear(3, 2), torch.ones(4, 3)
        >>> (loss,) = output_losses(net, [lambda m: m(x)])
        >>> loss(net).shape
        torch.Size([])
    """
    losses: list[LossFunction] = []
    generator = torch.Generator().manual_seed(seed)
    for forward in forwards:
        with undisturbed(model), evaluating(model), torch.no_grad():
            outputs = _floats(forward(model))
        weights = []
        for y in outputs:
            signs = torch.randint(2, y.shape, generator=generator) * 2 - 1
            norm = y.norm().clamp(min=torch.finfo(y.dtype).tiny)
            weights.append(signs.to(y) / norm)
        losses.append(partial(_weighted_sum, forward, weights))
    return losses


def _weighted_sum(
    forward: Forward, weights: Sequence[Tensor], model: nn.Module
) -> Tensor:
    outputs = _floats(forward(model))
    sums = [(w * y).sum() for w, y in zip(weights, outputs, strict=True)]
    return torch.stack(sums).sum()


def _floats(outputs: Any) -> list[Tensor]:
    return [y for y in tree_tensors(outputs) if y.is_floating_point()]


def _at_once(
    config: PruningConfig,
    rounds: int | Sequence[float] | None,
    losses: Sequence[LossFunction],
) -> PruningConfig:
    """Return options of a run that goes to its target in so many cuts."""
    if not losses:
        raise ConfigError('losses', 'at least one', 'no losses', 'give some batches')
    if len(config.targets) != 1:
        got = str(len(config.targets))
        raise ConfigError('target', 'one target', got, 'name those before in rounds')
    (target,) = config.targets
    return PruningConfig.of(
        config,
        target=[{target.cost: share} for share in stations(target.ratio, rounds)],
        schedule=dict(type='one_shot', iterations=len(losses)),
        units_per_step=1,
        iterations=None,
        statistics_interval=1,
        compact_interval=None,
    )


def _decide(pruner: ChannelPruner, losses: Sequence[LossFunction]) -> PruneStep:
    """Score units by all batches, without any step, and prune them to the next target.

    Raises:
        ConfigError: If there are too few units that may go.
    """
    step = None
    with without_checkpointing():
        for loss in losses:
            pruner.model.zero_grad()
            loss(pruner.model).backward()
            step = pruner.step()
    pruner.model.zero_grad()
    assert step is not None  # all of an interval has gone by
    if not step.reached:
        cost = pruner.pending[0].cost
        left = step.totals.ratio(cost, pruner.units.full)
        expected = 'one that can be reached with the scores at hand'
        remedy = 'raise it, or give more batches'
        raise ConfigError('target', expected, f'{left:.3f} of {cost}', remedy)
    return step
