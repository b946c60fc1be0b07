"""Progress of a pruning run, for logs and plots."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.config import RUNNER_DIVISOR
from mmgfp.engine.plotting import plot_step
from mmgfp.pruner import ChannelPruner, PruneStep
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.selection.schedules import TimedSchedule
from mmgfp.selection.targets import Target
from mmgfp.units import UnitState
from mmgfp.utils.words import counted


class Progress:
    """Logs which channels are coupled, which ones go and how long it takes.

    Args:
        runner: The runner whose log and visualizer are written to.
        pruner: The pruner, prepared or resumed.
    """

    def __init__(self, runner: Runner, pruner: ChannelPruner) -> None:
        self.runner = runner
        self.pruner = pruner
        self._started = time.time()
        self._first_gap = self._gap()
        self._first_iteration = pruner.iteration
        #: When the last target is met, at the pace so far; None if there is no telling.
        self._due: float | None = None
        for hook in runner.hooks:
            if isinstance(hook, TimeToTarget):
                hook.progress = self
                return
        runner.register_hook(TimeToTarget(self))

    def log_groups(self, shape: Sequence[int] | None) -> None:
        """Log costs for one image of ``shape`` (C, H, W), and why layers stay."""
        grouping = self.pruner.units.grouping
        count = len(grouping.blocks)
        blocks = f' and {counted(count, "residual block")}' if count else ''
        self.runner.logger.info(
            f'pruning {grouping.units - count} units in {len(grouping.groups)} groups'
            f'{blocks}; costs are for one image of {shape}: {costs_text(self.pruner)}'
        )
        if grouping.blocks:
            names = ', '.join(grouping.names[len(grouping.groups) :])
            self.runner.logger.info(f'residual blocks that may go, too: {names}')
        for layer in grouping.frozen:
            self.runner.logger.info(f'{layer.layer} keeps channels: {layer.reason}')
        self._log_alignment()

    def _log_alignment(self) -> None:
        """Say which groups stay whole, or what doing without a divisor costs."""
        units, limits = self.pruner.units, self.pruner.limits
        divisor = limits.divisor
        if self.pruner.config.divisor == 'auto':
            self.runner.logger.info(f'divisor={divisor}, by the latency profile')
        elif divisor % RUNNER_DIVISOR:
            self.runner.logger.warning(
                f'divisor={divisor} lets groups end at widths that are no multiples of '
                f'{RUNNER_DIVISOR}: counts go down, but the time in onnxruntime may '
                'even rise (docs/performance.md)'
            )
        if narrow := NarrowGroups.of(limits, units.grouping).text:
            self.runner.logger.info(narrow)
        held = np.flatnonzero(limits.least == units.sizes)
        if len(held):
            names = ', '.join(units.grouping.names[g] for g in held)
            self.runner.logger.info(
                f'{len(held)} groups stay whole by min_channels, max_ratio and ratios, '
                f'or have one unit only: {names}'
            )

    def log_step(self, step: PruneStep) -> None:
        """Log and plot a pruning step."""
        plot_step(self.runner.visualizer, self.pruner, step, self.runner.iter + 1)
        self._estimate(step.exhausted)
        # The schedule may wait, as a linear one does ahead of its line.
        waits = not len(step.units) and not step.exhausted
        why = ' (ahead of schedule)' if waits else ''
        back = 0 if step.back is None else len(step.back)
        back_text = f' ({back} came back)' if back else ''
        gone, left = counts_text(self.pruner.units, step.units)
        self.runner.logger.info(
            f'pruned {gone}{why}{back_text}, {left} remain: '
            f'{costs_text(self.pruner)}, eta to the target {self._eta()}'
        )

    def ratio(self, target: Target) -> float:
        """Return the remaining share of the cost that ``target`` is about."""
        units = self.pruner.units
        return units.totals.ratio(target.cost, units.full)

    def _gap(self) -> float:
        """Return the distance to the farthest target, in shares of the full cost."""
        pending = self.pruner.pending
        return max((self.ratio(t) - t.ratio for t in pending), default=0.0)

    def _estimate(self, exhausted: bool) -> None:
        """Work out when the last target is met, at the pace so far.

        Args:
            exhausted: Whether there is nothing left to prune, so that it never is.
        """
        now = time.time()
        spent = now - self._started
        schedule = self.pruner.config.build_schedule()
        done: float
        left: float
        if isinstance(schedule, TimedSchedule):
            done = self.pruner.iteration - self._first_iteration
            left = max(schedule.iterations - self.pruner.iteration, 0)
        else:
            gap = self._gap()
            done, left = self._first_gap - gap, gap
        if not self.pruner.pending:
            self._due = now
        elif exhausted:
            self._due = None
        else:
            self._due = now + spent * left / done if done > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last target, None if there is no telling yet."""
        return None if self._due is None else max(self._due - time.time(), 0.0)

    def _eta(self) -> str:
        seconds = self.seconds_left
        if seconds is None:
            return 'unknown'
        return str(datetime.timedelta(seconds=round(seconds)))


class TimeToTarget(Hook):
    """Lets the ``eta`` in MMEngine's log lines be that of the last target.

    MMEngine counts to the end of the training loop, which is but an upper bound.

    Args:
        progress: What knows better.
    """

    #: After MMEngine's timer and before its logger.
    priority = 'NORMAL'

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Replace the time left, or take it away if there is no telling yet."""
        known = runner.message_hub.runtime_info
        if 'eta' in known:
            seconds = self.progress.seconds_left
            if seconds is None:
                known.pop('eta')
            else:
                runner.message_hub.update_info('eta', seconds)


def counts_text(units: UnitState, gone: np.ndarray) -> tuple[str, str]:
    """Return what a decision took and what is left, for people.

    Residual blocks are counted beside the units of channels, and those inside of a
    block that went count as units that went.

    Args:
        units: The units after the decision.
        gone: Numbers of those that it took.
    """
    grouping = units.grouping
    blocks, names = grouping.blocks_among(units.kept), grouping.blocks_among(gone)
    pruned = counted(len(gone) - len(names), 'unit')
    left = int(units.kept.sum()) - len(blocks)
    if not grouping.blocks:
        return pruned, str(left)
    which = f' ({", ".join(names)})' if names else ''
    total = len(grouping.blocks)
    return (
        f'{pruned} and {counted(len(names), "block")}{which}',
        f'{left} of {grouping.units - total} units and {len(blocks)} of '
        f'{counted(total, "block")}',
    )


def costs_text(pruner: ChannelPruner) -> str:
    """Return the remaining costs and their shares of the full ones, for people."""
    now, full = pruner.units.totals, pruner.units.full
    return ', '.join(
        f'{cost.label} {now[name] / cost.scale:.4g} {cost.unit} '
        f'({now.ratio(name, full):.1%})'
        for name, cost in pruner.units.costs.counters.items()
    )
