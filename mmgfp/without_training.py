"""Pruning without training: statistics, a cut, refitting, and again if it is far."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.recording import evaluating
from mmgfp.config import PruningConfig
from mmgfp.criteria.checks import unscored_groups
from mmgfp.pruner import ChannelPruner, PruneStep
from mmgfp.rounds import Journal, Pruned, Round, stations
from mmgfp.selection.costs import LayerProfile
from mmgfp.surgery.compact import compact
from mmgfp.surgery.expand import take_over
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import (
    Forward,
    LossFunction,
    all_parameters_require_grad,
    copy_module,
    without_checkpointing,
)
from mmgfp.utils.words import listed


def prune_without_training(
    model: nn.Module,
    losses: Sequence[LossFunction],
    forward: Forward,
    images: int,
    config: PruningConfig | Mapping[str, Any] | None = None,
    compensation: CompensationConfig | None = None,
    rounds: int | Sequence[float] | None = None,
    profiles: Mapping[str, LayerProfile] | None = None,
    tracing_loss: LossFunction | None = None,
    journal: Journal | None = None,
) -> Pruned:
    """Prune a trained model by statistics of some batches, and refit what remains.

    Each round scores units by all batches, cuts the lowest and refits what reads them.

    Args:
        model: The trained model; it is left as it is.
        losses: Compute the loss of a model in eval mode on one batch each, a scalar.
        forward: Returns all outputs that the module it is given has at inference.
        images: Number of images in the batch of ``forward`` and the tracing loss.
        config: What may go, by which criterion, to which target; not the pace.
        compensation: How layers are refitted; None leaves the model as cut.
        rounds: See `stations`.
        profiles: How often layers use their weights for one image; recorded if None.
        tracing_loss: Finds coupled channels by its graph; the first loss by default.
        journal: Is told how it goes, and may hold a state to go on from.

    Raises:
        ConfigError: If the target cannot be reached, or a state does not fit.
        TraceError: If nothing can be pruned.

    Examples:
        >>> import torch
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
        journal = journal or Journal()
        if journal.state is None:
            journal.report('finding coupled channels')
            pruner.prepare(tracing_loss or losses[0], forward, images, profiles)
        return _Rounds(model, pruner, losses, compensation, journal).run()


@dataclass
class _Rounds:
    """All rounds of a run.

    Attributes:
        model: The original model.
        pruner: Prunes a copy of it, which stays as large and takes over new weights.
        losses: The losses of all batches.
        compensation: How layers are refitted.
        journal: Is told how it goes.
        small: The compact model.
        done: The rounds so far.
        importance: Importance of the units before the last round, (U,).
    """

    model: nn.Module
    pruner: ChannelPruner
    losses: Sequence[LossFunction]
    compensation: CompensationConfig | None
    journal: Journal
    small: nn.Module = field(init=False)
    done: list[Round] = field(default_factory=list)
    importance: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.small = self.model

    def run(self) -> Pruned:
        """Prune to all targets that are not reached yet."""
        if self.journal.state is not None:
            self.restore(self.journal.state)
        self.journal.prepared()
        while not self.pruner.done:
            self.prune()
            self.journal.after_round(self.done[-1], self.state())
        units = self.pruner.units
        assert self.pruner.discovery is not None
        return Pruned(
            self.small,
            units.structure(),
            units.full,
            tuple(self.done),
            self.pruner.discovery,
            units.kept,
            self.importance,
            self.pruner.limits,
        )

    def prune(self) -> None:
        """Prune to the next target, and refit what remains."""
        pruner, units = self.pruner, self.pruner.units
        before = units.kept.copy()
        target, count = pruner.pending[0], len(pruner.config.targets)
        name = f'{target.cost} to {target.ratio:.0%}'
        if count > 1:
            # One cut may go past several targets.
            name = f'round {len(pruner.reached) + 1} of {count}, {name}'
        self.journal.report(f'{name}: scoring units')
        step = _decide(pruner, self.losses)
        self.importance = step.importance
        share = step.totals.ratio(target.cost, units.full)
        facts = (step.reached[-1], step.totals, share, step.units)
        if self.compensation is None:
            self.small = compact(self.model, units.structure())
            self.done.append(Round(*facts))
            return

        def refitting(layers: int, total: int) -> None:
            self.journal.report(f'{name}: {layers} of {total} layers refitted')

        grouping, kept = units.grouping.remaining(before), units.kept[before]
        options = (self.losses, self.compensation, refitting)
        result = compensate(self.small, grouping, kept, *options)
        self.small = result.model
        take_over(pruner.model, self.small, units.structure())
        self.done.append(Round(*facts, result.layers, result.norms))

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        weights = {'model': self.pruner.model, 'small': self.small}
        return {
            'pruner': self.pruner.state_dict(),
            # Copies, as later rounds change them.
            **{name: copy.deepcopy(m.state_dict()) for name, m in weights.items()},
            'rounds': [done.to_dict() for done in self.done],
            'importance': torch.as_tensor(self.importance),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If it is damaged, or of another model.
        """
        try:
            self.pruner.load_state_dict(state['pruner'])
            self.pruner.model.load_state_dict(state['model'])
            self.small = compact(self.model, self.pruner.units.structure())
            self.small.load_state_dict(state['small'])
            self.done = [Round.from_dict(raw) for raw in state['rounds']]
            self.importance = state['importance'].numpy()
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            got = f'{type(error).__name__}: {error}'
            expected = 'one that after_round was given for this model'
            raise ConfigError('state', expected, got, 'begin anew') from error
        targets = self.pruner.config.targets
        reached = self.pruner.reached
        if reached != targets[: len(reached)]:
            expected = f'the first of {[target.ratio for target in targets]}'
            got = repr([target.ratio for target in reached])
            raise ConfigError('rounds of the state', expected, got, 'begin anew')


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
        recover=False,  # a unit that was cut is refitted away
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
        remedy = f'raise it{_unscored(pruner, step)}'
        raise ConfigError('target', expected, f'{left:.3f} of {cost}', remedy)
    return step


def _unscored(pruner: ChannelPruner, step: PruneStep) -> str:
    """Return a remark on groups without any score, empty if there are none."""
    assert step.importance is not None
    units = pruner.units
    names = unscored_groups(step.importance, units.grouping, units.kept)
    return f'; nothing is known of {listed(names)}, which stay' if names else ''
