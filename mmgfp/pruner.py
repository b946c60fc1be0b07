"""The pruning loop of a plain module: criterion, selection, masks (paper, alg. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from mmgfp.checkpoint import RunState
from mmgfp.config import PruningConfig
from mmgfp.criteria.base import Criterion, Reduce, ScoringContext
from mmgfp.criteria.checks import ScoreChecks
from mmgfp.criteria.fisher import Fisher
from mmgfp.discovery.discover import Discovery, discover
from mmgfp.groups import Grouping
from mmgfp.selection.costs import LayerProfile, Totals
from mmgfp.selection.schedules import DecisionPoint
from mmgfp.selection.targets import Target
from mmgfp.surgery.aside import values_aside
from mmgfp.surgery.compact import compact_
from mmgfp.surgery.masking import check_not_masked
from mmgfp.units import UnitState, scoring_context
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import Forward, LossFunction, copy_module, undisturbed
from mmgfp.utils.validation import check_not_compiled, refuse_copy


@dataclass(frozen=True)
class PruneStep:
    """The outcome of one pruning decision.

    Attributes:
        units: Numbers of the units that were pruned.
        totals: Costs of the remaining model.
        reached: Targets that this decision met for the first time.
        exhausted: Whether nothing was pruned although the schedule asked for it.
        importance: Importance of every unit that the decision went by, (U,); NaN where
            nothing was known.
        back: Numbers of pruned units that are kept again (``recover``), (W,).
    """

    units: np.ndarray
    totals: Totals
    reached: tuple[Target, ...]
    exhausted: bool = False
    importance: np.ndarray | None = None
    back: np.ndarray | None = None

    def __repr__(self) -> str:
        parts = f'{len(self.units)} units, totals={self.totals}'
        return f'PruneStep({parts}, reached={self.reached}, exhausted={self.exhausted})'


class ChannelPruner:
    """Prunes the channels of a module while it trains (paper, algorithm 2).

    Wraps any `nn.Module`. `prepare` finds the coupled channels once; after that the
    module trains as usual, with `step` called after each iteration.

    Args:
        model: The module to prune; it is masked in place and keeps its shape.
        config: Options of the run; the defaults if None.
        **options: Options by name, see `PruningConfig`; they override ``config``.

    Attributes:
        criterion: How importance is measured.
        iteration: Iterations so far.
        reached: Targets that are met.

    Raises:
        ConfigError: If an option is unknown, out of range or at odds with another one,
            or the module is wrapped by torch.compile.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> pruner = ChannelPruner(model, interval=1, target=dict(flops=0.5))
        >>> groups = pruner.prepare(
        ...     loss=lambda m: m(images).square().mean(), forward=lambda m: m(images),
        ...     images=2)
        >>> while not pruner.done:
        ...     model(images).square().mean().backward()
        ...     step = pruner.step()
        >>> pruner.compact()[0].out_channels
        4
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.config = PruningConfig.of(config, **options)
        check_not_compiled(model)
        self.model = model
        self.schedule = self.config.build_schedule()
        self.criterion: Criterion = self.config.build_criterion()
        self.checks = ScoreChecks(self.config.max_nonfinite)
        self.iteration = 0
        self.reached: tuple[Target, ...] = ()
        self.discovery: Discovery | None = None
        self._units: UnitState | None = None
        self._copies: list[nn.Module] = []
        self._context: ScoringContext | None = None

    @property
    def units(self) -> UnitState:
        """Which units are kept and which are in the model; a ConfigError before."""
        if self._units is None:
            raise ConfigError('the pruner is not prepared; call prepare first')
        return self._units

    @property
    def pending(self) -> list[Target]:
        """Targets not reached yet; none are left when the pruner is ``done``."""
        return [t for t in self.config.targets if t not in self.reached]

    @property
    def done(self) -> bool:
        """Whether all targets are reached."""
        return not self.pending

    def prepare(
        self,
        loss: LossFunction,
        forward: Forward,
        images: int,
        profiles: Mapping[str, LayerProfile] | None = None,
    ) -> Grouping:
        """Find the coupled channels, verify them, and start to watch.

        Args:
            loss: Computes the training loss of the module it is given, a scalar, on
                a real batch.
            forward: Returns all outputs that the module it is given has at inference.
            images: Number of images in the batch of ``loss`` and ``forward``.
            profiles: How often each layer uses its weight for one image, by weight;
                recorded from ``forward`` if not given.

        Raises:
            TraceError: If nothing can be pruned, or ``strict`` asks for an error.
            ConfigError: If ``keep``, a target or the state of the model does not fit.
        """
        with undisturbed(self.model):  # reading a spectral norm's weight changes it
            self.attach(self.discover(loss, forward, images, profiles))
        return self.units.grouping

    def discover(
        self,
        loss: LossFunction,
        forward: Forward,
        images: int,
        profiles: Mapping[str, LayerProfile] | None = None,
    ) -> Discovery:
        """Return the discovery that `prepare` makes, for processes that share it."""
        check_not_masked(self.model)
        batch, asked = (loss, forward, images, profiles), self.config
        how = (asked.keep, asked.coupled, asked.strict, self.criterion.unscorable)
        return discover(self.model, *batch, *how, asked.blocks)

    def attach(self, discovery: Discovery, kept: np.ndarray | None = None) -> None:
        """Start to watch, with a discovery (and kept units) of another run."""
        facts = (discovery.grouping, discovery.profiles, self._copies)
        units = UnitState(self.model, *facts, self.config.costs, self.config.recover)
        self.limits = units.limits(self.config, self.pending, kept)
        self.discovery, self._units = discovery, units
        self._watch()

    def _watch(self) -> None:
        """Let the criterion watch the model as it is now."""
        self.criterion.detach()
        rows = self.discovery.rows  # type: ignore[union-attr]
        self._context = scoring_context(self.units, rows)
        self.criterion.attach(self._context)
        self._watch_next()

    def _watch_next(self) -> None:
        """Let the next iteration count if it is its turn."""
        turn = (self.iteration + 1) % self.config.statistics_interval == 0
        self.criterion.watch(turn)

    def step(
        self, loss_scale: float = 1.0, reduce: Reduce | None = None
    ) -> PruneStep | None:
        """Take in one iteration, after its backward and its optimizer's step.

        Args:
            loss_scale: The factor on the loss in backward, as of a gradient scaler.
            reduce: Sums a tensor over all processes and returns their number.

        Returns:
            PruneStep: The outcome of a decision, or None between two decisions.

        Raises:
            StatisticsError: If gradients were not finite in too many iterations.
        """
        units = self.units
        self.criterion.update(loss_scale)
        self.iteration += 1
        is_turn = self.iteration % self.config.interval == 0
        step = self._decide(reduce) if is_turn and not self.done else None
        units.masks[0].apply()  # the optimizer may have moved masked columns
        self._watch_next()
        return step

    def _decide(self, reduce: Reduce | None) -> PruneStep:
        """Score all units, select those that go, mask them (paper, algorithm 2)."""
        units, interval = self.units, self.config.interval
        scores = self.criterion.scores(reduce)
        self.checks.check(scores, units.grouping, units.kept, interval)
        costs, ends = (units.totals, units.full), (self.config.targets, self.pending)
        state = (*costs, *ends, scores.values, units.kept)
        point = DecisionPoint(self.iteration, interval, *state)
        quota = self.schedule.quota(point)
        gone, back = units.select(point, quota, self.limits, self.config.normalize)
        units.prune(gone, back)
        self.criterion.reset()
        totals = units.totals
        reached = tuple(t for t in self.pending if t.reached(totals, units.full))
        self.reached += reached
        exhausted = not len(gone) and not quota.is_met(totals, point)
        if exhausted:
            self.checks.warn_of_nothing_to_prune(scores, units.kept)
        return PruneStep(gone, totals, reached, exhausted, scores.values, back)

    def track_copy(self, copied: nn.Module) -> None:
        """Mask and cut a copy with the same tensors, such as an average, as well."""
        self._copies.append(copied)
        if self._units is not None:
            self._units.track_copy(copied)

    def compact(self, copied: nn.Module | None = None) -> nn.Module:
        """Return a compact copy of the model as it stands, or of a copy it tracks."""
        structure = self.units.remaining_structure(self.units.kept)
        self.criterion.detach()  # its hooks have no business in the copy
        try:
            small = copy_module(self.model if copied is None else copied)
        finally:
            if self._context is not None:
                self.criterion.attach(self._context)
        return compact_(small, structure)

    def compact_(self, optimizers: Sequence[Optimizer] = ()) -> bool:
        """Cut the pruned units out of the model while it goes on training.

        The model computes what it did, faster. Its parameters are new objects: their
        gradients, the given optimizers and tracked copies follow; anything else that
        holds on to parameters, such as a wrapper for several processes, must be built
        anew. Call it between `step` and the next forward pass.

        Returns:
            bool: Whether there was anything to cut.

        Raises:
            ConfigError: If an optimizer's state cannot be cut; nothing has changed.
        """
        if has_cut := self.units.compact_(optimizers):
            self._watch()
        return has_cut

    def close(self) -> None:
        """Take all hooks off the model; masked columns stay at zero."""
        self.criterion.detach()
        self._context = None
        if self._units is not None:
            self._units.close()

    __reduce_ex__ = refuse_copy  # which pickle, copy.copy and copy.deepcopy call

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume, in plain types and tensors."""
        units, criterion = self.units, self.criterion.state_dict()
        progress = (self.iteration, units.kept, units.in_model)
        state = (*progress, criterion, self.reached, values_aside(units.asides))
        return RunState(self.discovery, *state).to_dict(self.config)  # type: ignore

    def load_state_dict(
        self, state: Mapping[str, Any], optimizers: Sequence[Optimizer] = ()
    ) -> None:
        """Go on where `state_dict` was taken; `prepare` is not needed before.

        Groups and costs are those of the interrupted run. The model is unpruned when
        this is called, and is cut, with the optimizers that train it, as it was there:
        its weights are to be loaded afterwards.

        Raises:
            ConfigError: If the state does not fit; the model is as it was, unwatched.
        """
        saved = RunState.from_dict(state, self.model, self.config)
        self.close()
        progress = self.iteration, self.reached
        self.iteration, self.reached = saved.iteration, saved.reached
        try:
            self.attach(saved.discovery, saved.kept)
            self.criterion.load_state_dict(saved.criterion)  # before the model changes
            self.units.restore(saved.kept, saved.in_model, optimizers, saved.aside)
            self._watch()
        except BaseException:
            self.close()
            self._units, (self.iteration, self.reached) = None, progress
            raise


class GroupFisherPruner(ChannelPruner):
    """A `ChannelPruner` by Fisher information, the method of the paper.

    Args:
        model: The module to prune.
        config: Options of the run; the defaults if None.
        **options: Options by name, see `PruningConfig`; not ``criterion``.

    Raises:
        ConfigError: If an option is not valid.
    """

    criterion: Fisher

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, config, **options)
        require_fisher(self.config, 'ChannelPruner')


def require_fisher(config: PruningConfig, general: str) -> None:
    """Refuse another criterion than Fisher information.

    Args:
        config: Options of a run.
        general: The class that takes any criterion.

    Raises:
        ConfigError: If the criterion is another one.
    """
    if not isinstance(config.build_criterion(), Fisher):
        raise ConfigError(
            'criterion', "'fisher'", repr(config.criterion), f'use {general}'
        )
