"""Group Fisher pruning of a plain module: groups, statistics, masks and costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from mmgfp.checkpoint import PrunerState
from mmgfp.config import check_not_compiled, check_options, parse_targets
from mmgfp.criteria.fisher import FisherTap, weight_owners
from mmgfp.criteria.statistics import Importance, Reduce, UnitStatistics
from mmgfp.discovery.discover import Discovery, discover
from mmgfp.discovery.profile import Forward, LossFunction, copy_module
from mmgfp.groups import Grouping
from mmgfp.selection.costs import CostTable, LayerProfile, Totals
from mmgfp.selection.greedy import (
    Limits,
    Target,
    auto_bound,
    rest_steps,
    select_units,
    waypoints,
)
from mmgfp.surgery.compact import compact
from mmgfp.surgery.live import cut_live, units_to_keep_in_model
from mmgfp.surgery.masking import ColumnMask
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.errors import StatisticsError

logger = logging.getLogger('mmgfp')


@dataclass(frozen=True)
class PruneStep:
    """What one pruning decision did.

    Attributes:
        units: Numbers of the units that went.
        totals: Costs of what is left.
        reached: Targets that this step met for the first time.
    """

    units: np.ndarray
    totals: Totals
    reached: tuple[Target, ...]


class GroupFisherPruner:
    """Prunes the channels of a module while it trains (paper, algorithm 2).

    Wraps any `nn.Module`. `prepare` finds the coupled channels once; after that the
    module trains as usual, with `step` called after each iteration.

    Args:
        model: The module to prune; it is masked in place and keeps its shape.
        interval: Iterations between two decisions.
        normalize: Cost that the importance is divided by: ``'memory'`` (the paper's
            -M), ``'flops'`` (-F) or ``'none'`` (-U).
        target: When to stop, such as ``dict(flops=0.5)``; a list gives several
            stations on the way.
        units_per_step: Units that go at each decision; ``'auto'`` takes as many as
            together have, at worst, little of all importance (`auto_bound`).
        iterations: Iterations in which the last target is reached, at an even pace of
            its cost; instead of ``units_per_step``.
        divisor: Channels of a group come to rest at multiples of this number only, if
            at all they get fewer.
        min_channels: Output channels that always stay in each group.
        max_ratio: Largest share of a group that may go.
        keep: Names or glob patterns of layers that are never pruned.
        coupled: Whether channels that several layers share may go; False leaves those
            that one layer makes and one other reads (the paper's ablation -I).
        strict: Raise where something cannot be pruned for lack of understanding,
            instead of leaving it alone and reporting it.
        max_nonfinite: Iterations in a row with gradients that are not finite, after
            which it is an error; one such iteration is merely not counted.
        statistics_interval: Iterations from one that is watched to the next; those
            between cost what plain training costs, and decisions rest on less.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int = 10,
        normalize: str = 'memory',
        target: Mapping[str, float] | Sequence[Mapping[str, float]] = {'flops': 0.5},  # noqa: B006
        units_per_step: int | str = 1,
        min_channels: int = 1,
        max_ratio: float = 1.0,
        keep: Sequence[str] = (),
        coupled: bool = True,
        strict: bool = False,
        max_nonfinite: int = 100,
        statistics_interval: int = 1,
        iterations: int | None = None,
        divisor: int = 1,
    ) -> None:
        self.targets = parse_targets(target)
        check_options(
            {
                'interval': interval,
                'normalize': normalize,
                'units_per_step': units_per_step,
                'min_channels': min_channels,
                'max_ratio': max_ratio,
                'keep': keep,
                'coupled': coupled,
                'max_nonfinite': max_nonfinite,
                'statistics_interval': statistics_interval,
                'iterations': iterations,
                'divisor': divisor,
            },
            len(self.targets),
        )
        check_not_compiled(model)
        self.model = model
        self.interval = interval
        self.normalize = normalize
        self.units_per_step = units_per_step
        self.iterations = iterations
        self.divisor = divisor
        self.min_channels = min_channels
        self.max_ratio = max_ratio
        self.keep = tuple(keep)
        self.coupled = coupled
        self.strict = strict
        self.max_nonfinite = max_nonfinite
        self.statistics_interval = statistics_interval
        self.discovery: Discovery | None = None
        self.grouping = self.remaining = Grouping((), (), {})
        self._copies: list[nn.Module] = []
        self.iteration = 0
        self._dropped = 0
        self.reached: list[Target] = []
        self._warned: set[str] = set()

    # -- preparation ---------------------------------------------------------

    def prepare(
        self,
        loss: LossFunction,
        forward: Forward,
        images: int,
        profiles: Mapping[str, LayerProfile] | None = None,
    ) -> Grouping:
        """Find the coupled channels, prove them, and start to watch.

        Args:
            loss: Computes the training loss of the module it is given, a scalar, on
                a real batch.
            forward: Returns all outputs that the module it is given has at inference.
            images: Number of images in the batch of ``forward``.
            profiles: What each layer works on, by weight, for one image; recorded from
                ``forward`` if not given.

        Raises:
            TraceError: Nothing can be pruned; under ``strict``, also if an op has no
                rule or the proof fails for a group.
            ConfigError: A pattern of ``keep`` matches no layer.
        """
        self.attach(self.discover(loss, forward, images, profiles))
        return self.grouping

    def discover(
        self,
        loss: LossFunction,
        forward: Forward,
        images: int,
        profiles: Mapping[str, LayerProfile] | None = None,
    ) -> Discovery:
        """What `prepare` finds, for processes or runs that share it."""
        options = (self.keep, self.coupled, self.strict)
        return discover(self.model, loss, forward, images, profiles, *options)

    def attach(self, discovery: Discovery) -> None:
        """Start to watch on the grounds of what was found before.

        Args:
            discovery: What `discover` gave for this model, in this process, in
                another one or before an interruption.
        """
        self.discovery = discovery
        self.grouping = self.remaining = discovery.grouping
        groups = self.grouping.groups
        parameters = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        self.costs = CostTable(parameters, discovery.profiles, groups)
        #: Costs of the unpruned model.
        self.full = self.costs.totals(np.zeros(len(groups)))
        self.shapes = shapes_of(self.model)
        self.kept = np.ones(self.grouping.units, dtype=bool)
        self.in_model = self.kept.copy()
        self._group_of = self.grouping.group_of
        device = next(self.model.parameters()).device
        self.statistics = UnitStatistics({}, self._group_of, device)
        self._watch()
        self._widths = np.array(
            [next(m.width for m in g.members if m.role == 'out') for g in groups]
        )
        self._steps = rest_steps(self._widths, self.divisor)
        sizes = np.array([g.units for g in groups])
        least = -(-self.min_channels // self._widths)
        self.limits = Limits.of(sizes, least, self.max_ratio)

    def track_copy(self, copied: nn.Module) -> None:
        """Mask and cut a copy of the model along with it, such as an averaged one.

        Args:
            copied: A module with tensors of the same names and shapes.
        """
        self._copies.append(copied)
        if self.discovery is not None:
            self._masks.append(self._masked(copied))

    def _watch(self) -> None:
        """Tap and mask the model as it is now."""
        assert self.discovery is not None
        # Units keep their first numbers in all statistics.
        numbers = np.append(np.flatnonzero(self.in_model), -1)
        owners = weight_owners(self.model)
        units = {
            module: torch.from_numpy(numbers[index])
            for weight, index in self.remaining.inputs.items()
            for module in owners.get(weight, ())
            if (index >= 0).any()
        }
        self.statistics.read(units)
        modules, rows = dict(self.model.named_modules()), self.discovery.rows
        self.tap = FisherTap(
            {name: modules[name] for name in units},
            rows,
            [modules[name] for name in rows.first],
            units,
        )
        self._watch_next()
        self.tap.attach()
        self.mask = self._masked(self.model)
        self._masks = [self.mask, *map(self._masked, self._copies)]

    def _masked(self, model: nn.Module) -> ColumnMask:
        """A mask of what went and is still there."""
        mask = ColumnMask(model, self.remaining.groups)
        mask.update(self.kept[self.in_model])
        return mask

    def _update_masks(self) -> None:
        for mask in self._masks:
            mask.update(self.kept[self.in_model])

    # -- state ---------------------------------------------------------------

    @property
    def pending(self) -> list[Target]:
        """Targets not reached yet."""
        return [t for t in self.targets if t not in self.reached]

    @property
    def done(self) -> bool:
        """Whether all targets are reached."""
        return not self.pending

    @property
    def removed(self) -> np.ndarray:
        """Units removed from each group, (G,)."""
        return np.bincount(
            self._group_of[~self.kept], minlength=len(self.grouping.groups)
        )

    @property
    def importance(self) -> np.ndarray:
        """Fisher information since the last decision, in this process, (U,)."""
        return self.statistics.importance

    @property
    def totals(self) -> Totals:
        """Costs of what is left."""
        return self.costs.totals(self.removed)

    def structure(self) -> PruneStructure:
        """What is kept of every tensor dimension of the unpruned model."""
        return PruneStructure.of(self.grouping.groups, self.kept, self.shapes)

    def in_model_structure(self) -> PruneStructure:
        """What of the unpruned model is still there, masked or not."""
        return PruneStructure.of(self.grouping.groups, self.in_model, self.shapes)

    def compact(self, copied: nn.Module | None = None) -> nn.Module:
        """A compact copy of the model as it stands, or of one that follows it."""
        self.tap.detach()
        try:
            made = copy_module(self.model if copied is None else copied)
        finally:
            self.tap.attach()
        return compact(made, self._rest(self.kept))

    def _rest(self, units: np.ndarray) -> PruneStructure:
        """What is left of the model as it is now if only ``units``, (U,), stay."""
        shapes = shapes_of(self.model)
        return PruneStructure.of(self.remaining.groups, units[self.in_model], shapes)

    def compact_(self, optimizers: Sequence[Optimizer] = ()) -> bool:
        """Cut what was pruned out of the model while it goes on training.

        A few masked units may stay, so that kernels find even numbers of channels
        (`units_to_keep_in_model`).

        The model computes what it did, faster. Its parameters are new objects: their
        gradients, the optimizers and the copies that `follow` it are seen to; anything
        else that holds on to parameters, such as a wrapper for several processes, must
        be built anew. Call it between `step` and the next forward pass.

        Args:
            optimizers: Those that train the model.

        Returns:
            bool: Whether there was anything to cut.

        Raises:
            ConfigError: An optimizer's state is of a kind that cannot be cut; nothing
                has changed then.
        """
        units = units_to_keep_in_model(
            self.kept, self.in_model, self._group_of, self._widths
        )
        return self._cut(units, optimizers)

    def _cut(self, units: np.ndarray, optimizers: Sequence[Optimizer]) -> bool:
        """Let only ``units``, (U,), stay in the model."""
        if np.array_equal(units, self.in_model):
            return False
        cut_live(self.model, self._rest(units), optimizers, self._copies)
        self.close()
        self.in_model = units.copy()
        self.remaining = self.grouping.remaining(self.in_model)
        self._watch()
        return True

    def close(self) -> None:
        """Take all hooks off the model; masked columns stay at zero."""
        self.tap.detach()
        for mask in self._masks:
            mask.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain types and tensors."""
        assert self.discovery is not None, 'call prepare first'
        state = PrunerState(
            self.discovery,
            self.iteration,
            self.kept,
            self.in_model,
            self.statistics.state_dict(),
            self.reached,
        )
        return state.to_dict(self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """Arguments that a resumed run must not change."""
        return {'keep': self.keep, 'coupled': self.coupled}

    def load_state_dict(
        self, state: Mapping[str, Any], optimizers: Sequence[Optimizer] = ()
    ) -> None:
        """Go on where `state_dict` was taken; `prepare` is not needed before.

        Groups and costs are those of the interrupted run, whatever a batch of this
        one would show. The model is unpruned when this is called, and cut down to what
        the interrupted run had left of it: its weights are to be loaded afterwards.

        Args:
            state: What `state_dict` gave.
            optimizers: Those that train the model.

        Raises:
            ConfigError: The state is of another version, model or configuration.
        """
        found = PrunerState.from_dict(state, self.model, self._options)
        if self.discovery is not None:
            self.close()
        self.attach(found.discovery)
        self.iteration, self.kept = found.iteration, found.kept
        self.reached = found.reached
        self.statistics.load_state_dict(found.statistics)
        if not self._cut(found.in_model, optimizers):
            self._update_masks()
        self._watch_next()

    # -- one iteration -------------------------------------------------------

    def step(
        self, loss_scale: float = 1.0, reduce: Reduce | None = None
    ) -> PruneStep | None:
        """Call after each iteration's backward and optimizer step.

        Args:
            loss_scale: What the loss was multiplied with before backward, as by a
                gradient scaler.
            reduce: Where several processes train together, sums a tensor over them,
                in place, and returns their number; called at decisions only.

        Returns:
            PruneStep: What was pruned, or None between two decisions.

        Raises:
            StatisticsError: Too many iterations in a row had gradients that are not
                finite.
        """
        gradients, lost = self.tap.take(), self.tap.take_lost()
        for reason in dict.fromkeys(lost.values()):
            layers = ', '.join(n for n, r in lost.items() if r == reason)
            self._warn_once(
                f'the inputs of {layers} are not counted in some iterations: {reason}'
            )
        self.statistics.add(gradients, lost, loss_scale)
        self.iteration += 1
        step = None
        if self.iteration % self.interval == 0 and not self.done:
            step = self._prune(reduce)
        self.mask.apply()
        self._watch_next()
        return step

    def _watch_next(self) -> None:
        """Let the next iteration be watched if it is its turn."""
        self.tap.active = (self.iteration + 1) % self.statistics_interval == 0

    def _prune(self, reduce: Reduce | None) -> PruneStep:
        importance = self.statistics.collect(reduce)
        self._judge(importance)
        totals, full = self.totals, self.full
        count, bound, line = float('inf'), float('inf'), []
        if self.iterations is not None:
            line = waypoints(totals, full, self.pending, self._decisions_left)
        elif isinstance(self.units_per_step, str):
            bound = auto_bound(importance.values, self.kept)
        else:
            count = self.units_per_step

        def enough(now: Totals) -> bool:
            on_line = bool(line) and all(t.reached(now, full) for t in line)
            return on_line or any(t.reached(now, full) for t in self.pending)

        units = select_units(
            importance.values,
            self._group_of,
            self.kept,
            self.costs,
            self.limits,
            self.normalize,
            count,
            enough,
            self._steps,
            bound,
        )
        self.kept[units] = False
        self.statistics.reset()
        self._update_masks()
        totals = self.totals
        reached = tuple(t for t in self.pending if t.reached(totals, full))
        self.reached += reached
        return PruneStep(units, totals, reached)

    @property
    def _decisions_left(self) -> int:
        """Decisions up to ``iterations``, this one among them."""
        assert self.iterations is not None
        return self.iterations // self.interval - self.iteration // self.interval + 1

    def _judge(self, importance: Importance) -> None:
        """Say which groups saw no gradient; stop if no iteration is any good."""
        if importance.dropped_in_row >= self.max_nonfinite:
            raise StatisticsError(
                'gradients',
                'finite ones',
                f'NaN or infinity in the last {importance.dropped_in_row} iterations',
                'look at the loss, lower the learning rate or clip gradients; '
                'max_nonfinite sets how many are tolerated',
            )
        if importance.dropped > self._dropped:
            self._dropped = importance.dropped
            logger.warning(
                'gradients were not finite in %d iterations so far, which do not count',
                importance.dropped,
            )
        unseen = np.unique(self._group_of[np.isnan(importance.values)])
        if len(unseen) == len(self.grouping.groups) and importance.dropped_in_row:
            return  # which has been said
        for g in unseen:
            self._warn_once(
                f'group {self.grouping.groups[g].name} got no gradient in '
                f'{self.interval} iterations and is left alone until it does'
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)
