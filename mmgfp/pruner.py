"""Group Fisher pruning of a plain module: groups, statistics, masks and costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.costs import CostTable, LayerWork, Totals
from mmgfp.discovery import Discovery, discover
from mmgfp.errors import ConfigError, StatisticsError
from mmgfp.fisher import FisherTap, weight_owners
from mmgfp.groups import Grouping
from mmgfp.masking import ColumnMask
from mmgfp.recording import Forward, LossFunction, copy_module
from mmgfp.selection import (
    NORMALIZATIONS,
    Limits,
    Target,
    auto_bound,
    rest_steps,
    select_units,
    waypoints,
)
from mmgfp.statistics import Importance, Reduce, UnitStatistics
from mmgfp.structure import PruneStructure, shapes_of
from mmgfp.surgery import compact

logger = logging.getLogger('mmgfp')

#: Version of what `GroupFisherPruner.state_dict` gives.
STATE_VERSION = 1


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
        max_dropped: Iterations in a row with gradients that are not finite, after
            which it is an error; one such iteration is merely not counted.
        statistics_every: Iterations from one that is watched to the next; those
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
        max_dropped: int = 100,
        statistics_every: int = 1,
        iterations: int | None = None,
        divisor: int = 1,
    ) -> None:
        targets = list(target) if isinstance(target, list | tuple) else [target]
        self.targets = [Target.parse(t) for t in targets]
        _check('target', bool(self.targets), 'at least one target', target)
        _check_count('interval', interval)
        if units_per_step != 'auto':
            what = 'a whole number of at least 1, or auto'
            _check_count('units_per_step', units_per_step, what)
        if iterations is not None:
            least = interval * len(self.targets)
            what = f'a whole number, at least the interval for each target: {least}'
            _check_count('iterations', iterations, what, least)
            alone = units_per_step == 1
            expected = 'not given beside iterations, which sets the pace'
            _check('units_per_step', alone, expected, units_per_step)
        _check_count('divisor', divisor)
        _check_count('min_channels', min_channels)
        _check_count('max_dropped', max_dropped)
        _check_count('statistics_every', statistics_every)
        expected = f'at most the interval, {interval}'
        _check(
            'statistics_every', statistics_every <= interval, expected, statistics_every
        )
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
        if hasattr(model, '_orig_mod') or getattr(model, '_compiled_call_impl', None):
            raise ConfigError(
                'model',
                'a module without torch.compile, as pruning looks into every layer',
                f'a compiled {type(getattr(model, "_orig_mod", model)).__name__}',
                'prune first; the compact model can be compiled for fine-tuning',
            )
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
        self.max_dropped = max_dropped
        self.statistics_every = statistics_every
        self.discovery: Discovery | None = None
        self.grouping = Grouping((), (), {})
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
        self.begin(self.discover(loss, forward, images, work))
        return self.grouping

    def discover(
        self,
        loss: LossFunction,
        forward: Forward,
        images: int,
        work: Mapping[str, LayerWork] | None = None,
    ) -> Discovery:
        """What `prepare` finds, for processes or runs that share it."""
        options = (self.keep, self.coupled, self.strict)
        return discover(self.model, loss, forward, images, work, *options)

    def begin(self, discovery: Discovery) -> None:
        """Start to watch on the grounds of what was found before.

        Args:
            discovery: What `discover` gave for this model, in this process, in
                another one or before an interruption.
        """
        self.discovery = discovery
        self.grouping = discovery.grouping
        groups = self.grouping.groups
        parameters = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        self.costs = CostTable(parameters, discovery.work, groups)
        self.shapes = shapes_of(self.model)
        self.alive = np.ones(self.grouping.units, dtype=bool)
        self._group_of = self.grouping.group_of
        owners = weight_owners(self.model)
        units = {
            module: torch.from_numpy(index)
            for weight, index in self.grouping.inputs.items()
            for module in owners.get(weight, ())
            if (index >= 0).any()
        }
        device = next(self.model.parameters()).device
        self.statistics = UnitStatistics(units, self._group_of, device)
        modules = dict(self.model.named_modules())
        self.tap = FisherTap(
            {name: modules[name] for name in units},
            discovery.rows,
            [modules[name] for name in discovery.rows.first],
            units,
        )
        self._watch_next()
        self.tap.attach()
        self.mask = ColumnMask(self.model, groups)
        widths = np.array(
            [next(m.width for m in g.members if m.role == 'out') for g in groups]
        )
        self._steps = rest_steps(widths, self.divisor)
        sizes = np.array([g.units for g in groups])
        least = -(-self.min_channels // widths)
        self.limits = Limits.of(sizes, least, self.max_ratio)

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
    def importance(self) -> np.ndarray:
        """Fisher information since the last decision, in this process, (U,)."""
        return self.statistics.importance

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
        assert self.discovery is not None, 'call prepare first'
        return {
            'version': STATE_VERSION,
            'options': {'keep': list(self.keep), 'coupled': self.coupled},
            'discovery': self.discovery.to_dict(),
            'iteration': self.iteration,
            'alive': torch.from_numpy(self.alive.copy()),
            'statistics': self.statistics.state_dict(),
            'reached': [{t.cost: t.ratio} for t in self.reached],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; `prepare` is not needed before.

        Groups and costs are those of the interrupted run, whatever a batch of this
        one would show.

        Raises:
            ConfigError: The state is of another version, model or configuration.
        """
        remedy = 'resume with the configuration that the run was started with'
        version = state.get('version')
        if version != STATE_VERSION:
            raise ConfigError(
                'checkpoint',
                f'a pruning state of version {STATE_VERSION}',
                repr(version),
                'start pruning anew from the weights, with load_from',
            )
        try:
            for name, value in state['options'].items():
                own = getattr(self, name)
                if (list(own) if isinstance(own, tuple) else own) != value:
                    raise ConfigError(name, repr(value), repr(own), remedy)
            discovery = Discovery.from_dict(state['discovery'], self.model)
            # A runner may have loaded the checkpoint onto a GPU.
            alive = state['alive'].cpu().numpy().copy()
            iteration, statistics = int(state['iteration']), state['statistics']
            reached = [Target.parse(t) for t in state['reached']]
        except (KeyError, TypeError, AttributeError) as error:
            got = f'{type(error).__name__}: {error}'
            raise ConfigError('checkpoint', 'a pruning state', got, remedy) from error
        _check_alive(alive, discovery.grouping, remedy)
        if self.discovery is not None:
            self.close()
        self.begin(discovery)
        self.iteration, self.alive, self.reached = iteration, alive, reached
        self.statistics.load_state_dict(statistics)
        self.mask.update(self.alive)
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
        self.tap.active = (self.iteration + 1) % self.statistics_every == 0

    def _prune(self, reduce: Reduce | None) -> PruneStep:
        importance = self.statistics.collect(reduce)
        self._judge(importance)
        totals, full = self.totals, self.full
        count, bound, line = float('inf'), float('inf'), []
        if self.iterations is not None:
            line = waypoints(totals, full, self.pending, self._decisions_left)
        elif isinstance(self.units_per_step, str):
            bound = auto_bound(importance.values, self.alive)
        else:
            count = self.units_per_step

        def enough(now: Totals) -> bool:
            on_line = bool(line) and all(t.reached(now, full) for t in line)
            return on_line or any(t.reached(now, full) for t in self.pending)

        units = select_units(
            importance.values,
            self._group_of,
            self.alive,
            self.costs,
            self.limits,
            self.normalize,
            count,
            enough,
            self._steps,
            bound,
        )
        self.alive[units] = False
        self.statistics.reset()
        self.mask.update(self.alive)
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
        if importance.dropped_in_row >= self.max_dropped:
            raise StatisticsError(
                'gradients',
                'finite ones',
                f'NaN or infinity in the last {importance.dropped_in_row} iterations',
                'look at the loss, lower the learning rate or clip gradients; '
                'max_dropped sets how many are tolerated',
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


def _check(field: str, fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise ConfigError(field, expected, repr(got), 'change the configuration')


def _check_alive(alive: np.ndarray, grouping: Grouping, remedy: str) -> None:
    """Units that stay must be those of the groups, some of each.

    Raises:
        ConfigError: They are not.
    """
    expected, got = f'a mask of {grouping.units} units', str(len(alive))
    fine = alive.shape == (grouping.units,)
    if fine:
        expected, got = f'{expected} that leaves some of each group', str(alive.dtype)
        fine = alive.dtype == bool
    if fine:
        left = np.bincount(grouping.group_of[alive], minlength=len(grouping.groups))
        empty = [g.name for g, n in zip(grouping.groups, left, strict=True) if not n]
        fine, got = not empty, f'none of {", ".join(empty)}'
    if not fine:
        raise ConfigError('checkpoint', expected, got, remedy)


def _check_count(
    field: str,
    value: object,
    expected: str = 'a whole number of at least 1',
    least: int = 1,
) -> None:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _check(field, fine, expected, value)
