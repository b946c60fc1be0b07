"""Group Fisher pruning of a plain module: groups, statistics, masks and costs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.costs import CostTable, LayerWork, Totals
from mmgfp.errors import ConfigError, TraceError
from mmgfp.fisher import FisherTap, unit_gradients, untapped, weight_owners
from mmgfp.groups import ChannelGroup, Grouping, build_groups
from mmgfp.masking import ColumnMask
from mmgfp.recording import (
    Forward,
    all_parameters_require_grad,
    copy_module,
    record_work,
    undisturbed,
    watch_outputs,
    without_checkpointing,
)
from mmgfp.selection import NORMALIZATIONS, Limits, Target, select_units
from mmgfp.structure import PruneStructure, shapes_of
from mmgfp.surgery import compact, has_attribute_rule
from mmgfp.tracing import judge_rows, trace_loss, watch_rows, watch_widths
from mmgfp.verify import Disagreement, find_disagreements

logger = logging.getLogger('mmgfp')

LossFunction = Callable[[nn.Module], Tensor]

#: Why a group is frozen that failed the proof; the difference follows.
DISPROVED = 'masked and compact disagree'
#: Why a group is frozen under ``coupled=False``.
SHARED = 'its channels are shared by several layers, and coupled=False'


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
        units_per_step: Units that go at each decision.
        min_channels: Output channels that always stay in each group.
        max_ratio: Largest share of a group that may go.
        keep: Names or glob patterns of layers that are never pruned.
        coupled: Whether channels that several layers share may go; False leaves those
            that one layer makes and one other reads (the paper's ablation -I).
        strict: Raise where something cannot be pruned for lack of understanding,
            instead of leaving it alone and reporting it.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int = 10,
        normalize: str = 'memory',
        target: Mapping[str, float] | Sequence[Mapping[str, float]] = {'flops': 0.5},  # noqa: B006
        units_per_step: int = 1,
        min_channels: int = 1,
        max_ratio: float = 1.0,
        keep: Sequence[str] = (),
        coupled: bool = True,
        strict: bool = False,
    ) -> None:
        targets = list(target) if isinstance(target, list | tuple) else [target]
        self.targets = [Target.parse(t) for t in targets]
        _check('target', bool(self.targets), 'at least one target', target)
        _check_count('interval', interval)
        _check_count('units_per_step', units_per_step)
        _check_count('min_channels', min_channels)
        fine = isinstance(max_ratio, int | float) and 0 < max_ratio <= 1
        _check('max_ratio', fine, 'a number in (0, 1]', max_ratio)
        _check(
            'normalize',
            normalize in NORMALIZATIONS,
            'one of ' + ', '.join(NORMALIZATIONS),
            normalize,
        )
        _check(
            'keep',
            isinstance(keep, list | tuple) and all(isinstance(k, str) for k in keep),
            'a list of layer names or patterns',
            keep,
        )
        _check('coupled', isinstance(coupled, bool), 'True or False', coupled)
        self.model = model
        self.interval = interval
        self.normalize = normalize
        self.units_per_step = units_per_step
        self.min_channels = min_channels
        self.max_ratio = max_ratio
        self.keep = tuple(keep)
        self.coupled = coupled
        self.strict = strict
        self.grouping = Grouping((), (), {})
        self.iteration = 0
        self.reached: list[Target] = []
        self._warned: set[str] = set()

    # -- preparation ---------------------------------------------------------

    def prepare(
        self,
        loss: LossFunction,
        forward: Forward,
        images: int,
        work: Mapping[str, LayerWork] | None = None,
    ) -> Grouping:
        """Find the coupled channels, prove them, and start to watch.

        Args:
            loss: Computes the training loss of the module it is given, a scalar, on
                a real batch.
            forward: Returns all outputs that the module it is given has at inference.
            images: Number of images in the batch of ``forward``.
            work: What each layer works on, by weight, for one image; recorded from
                ``forward`` if not given.

        Raises:
            TraceError: Nothing can be pruned; under ``strict``, also if an op has no
                rule or the proof fails for a group.
            ConfigError: A pattern of ``keep`` matches no layer.
        """
        self.grouping = self._proven_groups(loss, forward)
        if not self.grouping.groups:
            reasons = dict.fromkeys(f.reason for f in self.grouping.frozen)
            raise TraceError(
                'model',
                'at least one group of channels that can be pruned',
                'none',
                f'every layer is left alone because: {"; ".join(reasons)}',
            )
        work = record_work(self.model, forward, images) if work is None else work
        parameters = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        work = {n: w for n, w in work.items() if n in parameters}
        self.costs = CostTable(parameters, work, self.grouping.groups)
        self.shapes = shapes_of(self.model)
        self._start()
        return self.grouping

    def _proven_groups(self, loss: LossFunction, forward: Forward) -> Grouping:
        with (
            undisturbed(self.model),
            all_parameters_require_grad(self.model),
            without_checkpointing(self.model),
            torch.enable_grad(),
            watch_rows(self.model) as calls,
            watch_widths(self.model, has_attribute_rule) as widths,
            watch_outputs(self.model) as outputs,
        ):
            value = loss(self.model)
            trace = trace_loss(self.model, value, self.strict, widths, outputs)
        self._rows, self._owners = judge_rows(calls), weight_owners(self.model)
        weights = [call.weight for call in trace.calls]
        unread = untapped(weights, self._owners, self._rows)
        for op, layers in trace.unknown_ops.items():
            logger.warning('op %s has no rule; it freezes %s', op, ', '.join(layers))
        frozen: list[tuple[ChannelGroup, str]] = []
        if not self.coupled:
            every = build_groups(self.model, trace, self.keep, unread).groups
            frozen += [(g, SHARED) for g in every if not g.internal]
        while True:
            grouping = build_groups(self.model, trace, self.keep, unread, frozen)
            failures = find_disagreements(self.model, grouping, forward)
            if not failures:
                return grouping
            self._report(failures)
            frozen += [(f.group, f'{DISPROVED}: {f.reason}') for f in failures]

    def _report(self, failures: Sequence[Disagreement]) -> None:
        for failure in failures:
            members = ', '.join(f'{m.name}[{m.dim}]' for m in failure.group.members)
            logger.warning(
                'group %s is left alone, since %s (%s); its members: %s',
                failure.group.name,
                DISPROVED,
                failure.reason,
                members,
            )
        if self.strict:
            raise TraceError(
                f'groups {", ".join(f.group.name for f in failures)}',
                'equal outputs of the masked and the compact model',
                failures[0].reason,
                'name these layers in keep, or leave strict off to freeze them',
            )

    def _start(self) -> None:
        units = self.grouping.units
        self.alive = np.ones(units, dtype=bool)
        self.importance = np.zeros(units)
        self._group_of = self.grouping.group_of
        self._seen = np.zeros(len(self.grouping.groups), dtype=int)
        self._units = {
            module: torch.from_numpy(index)
            for weight, index in self.grouping.inputs.items()
            for module in self._owners.get(weight, ())
            if (index >= 0).any()
        }
        self.tap = self._new_tap()
        self.tap.attach()
        self.mask = ColumnMask(self.model, self.grouping.groups)
        widths = [
            next(m.width for m in g.members if m.role == 'out')
            for g in self.grouping.groups
        ]
        sizes = np.array([g.units for g in self.grouping.groups])
        least = -(-self.min_channels // np.array(widths))
        self.limits = Limits.of(sizes, least, self.max_ratio)

    def _new_tap(self) -> FisherTap:
        modules = dict(self.model.named_modules())
        layers = {name: modules[name] for name in self._units}
        first = [modules[name] for name in self._rows.first]
        return FisherTap(layers, self._rows, first)

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
            self._group_of[~self.alive], minlength=len(self.grouping.groups)
        )

    @property
    def totals(self) -> Totals:
        """Costs of what is left."""
        return self.costs.totals(self.removed)

    @property
    def full(self) -> Totals:
        """Costs of the unpruned model."""
        return self.costs.totals(np.zeros(len(self.grouping.groups)))

    def structure(self) -> PruneStructure:
        """What is kept in every tensor dimension."""
        return PruneStructure.of(self.grouping.groups, self.alive, self.shapes)

    def compact(self) -> nn.Module:
        """A compact copy of the model as it stands."""
        self.tap.detach()
        try:
            copied = copy_module(self.model)
        finally:
            self.tap.attach()
        return compact(copied, self.structure())

    def close(self) -> None:
        """Take all hooks off the model; masked columns stay at zero."""
        self.tap.detach()
        self.mask.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain types and tensors."""
        return {
            'fingerprint': self._fingerprint(),
            'iteration': self.iteration,
            'alive': torch.from_numpy(self.alive.copy()),
            'importance': torch.from_numpy(self.importance.copy()),
            'seen': torch.from_numpy(self._seen.copy()),
            'reached': [{t.cost: t.ratio} for t in self.reached],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, after `prepare` on the same model.

        Raises:
            ConfigError: The state belongs to other groups.
        """
        if state.get('fingerprint') != self._fingerprint():
            raise ConfigError(
                'checkpoint',
                'the pruning state of this model and configuration',
                'the state of other groups',
                'resume with the configuration that the run was started with',
            )
        self.iteration = int(state['iteration'])
        # A runner may have loaded the checkpoint onto a GPU.
        self.alive = state['alive'].cpu().numpy().copy()
        self.importance = state['importance'].cpu().numpy().copy()
        self._seen = state['seen'].cpu().numpy().copy()
        self.reached = [Target.parse(t) for t in state['reached']]
        self.mask.update(self.alive)

    def _fingerprint(self) -> str:
        text = repr([(g.name, g.units) for g in self.grouping.groups])
        return hashlib.sha256(text.encode()).hexdigest()

    # -- one iteration -------------------------------------------------------

    def step(self) -> PruneStep | None:
        """Call after each iteration's backward and optimizer step.

        Returns:
            PruneStep: What was pruned, or None between two decisions.
        """
        self._accumulate()
        self.iteration += 1
        step = None
        if self.iteration % self.interval == 0 and not self.done:
            step = self._prune()
        self.mask.apply()
        return step

    def _accumulate(self) -> None:
        gradients, lost = self.tap.take(), self.tap.take_lost()
        for layer, reason in lost.items():
            self._warn_once(
                f'the inputs of {layer} are not counted in some iterations, since its '
                f'rows cannot be told to images: {reason}'
            )
        if not gradients:
            return
        units = unit_gradients(gradients, self._units, len(self.alive))  # (N, U)
        importance = units.double().square().sum(0).cpu().numpy()
        if not np.isfinite(importance).all():
            return  # an overflow under mixed precision, whose update is skipped too
        blind = self._groups_read_by(lost)
        self.importance += np.where(np.isin(self._group_of, blind), 0, importance)
        self._seen[np.setdiff1d(self._groups_read_by(gradients), blind)] += 1

    def _groups_read_by(self, layers: Iterable[str]) -> np.ndarray:
        """Numbers of the groups that the layers read."""
        parts = [self._units[name].numpy() for name in layers]
        units = np.concatenate([np.empty(0, dtype=int), *parts])
        return np.unique(self._group_of[units[units >= 0]])

    def _prune(self) -> PruneStep:
        importance = self.importance.copy()
        unseen = self._seen == 0
        importance[unseen[self._group_of]] = np.nan
        for g in np.flatnonzero(unseen):
            self._warn_once(
                f'group {self.grouping.groups[g].name} got no gradient in '
                f'{self.interval} iterations and is left alone until it does'
            )
        full = self.full
        units = select_units(
            importance,
            self._group_of,
            self.alive,
            self.costs,
            self.limits,
            self.normalize,
            self.units_per_step,
            lambda now: any(t.reached(now, full) for t in self.pending),
        )
        self.alive[units] = False
        self.importance[:] = 0
        self._seen[:] = 0
        self.mask.update(self.alive)
        totals = self.totals
        reached = tuple(t for t in self.pending if t.reached(totals, full))
        self.reached += reached
        return PruneStep(units, totals, reached)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _check(field: str, fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise ConfigError(field, expected, repr(got), 'change the configuration')


def _check_count(field: str, value: object) -> None:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _check(field, fine, 'a whole number of at least 1', value)
