"""Progress of a pruning run, for logs and plots."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

import numpy as np
from mmengine.runner import Runner

from mmgfp.config import RUNNER_DIVISOR
from mmgfp.engine.artifact import costs_in_numbers
from mmgfp.pruner import ChannelPruner, PruneStep
from mmgfp.selection.latency import best_divisor
from mmgfp.selection.targets import Target


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

    def log_groups(self, shape: Sequence[int] | None) -> None:
        """Log costs for one image of ``shape`` (C, H, W), and why layers stay."""
        grouping = self.pruner.units.grouping
        self.runner.logger.info(
            f'pruning {grouping.units} units in {len(grouping.groups)} groups; costs '
            f'are for one image of {shape}: {costs_text(self.pruner)}'
        )
        for layer in grouping.frozen:
            self.runner.logger.info(f'{layer.layer} keeps channels: {layer.reason}')
        self._log_alignment()

    def _log_alignment(self) -> None:
        """Say which groups the divisor leaves whole, or what doing without it costs."""
        units, divisor = self.pruner.units, self.pruner.config.divisor
        if divisor == 'auto':
            divisor = best_divisor(units.costs, units.sizes, units.widths)
            self.runner.logger.info(f'divisor={divisor}, by the latency profile')
        elif divisor % RUNNER_DIVISOR:
            self.runner.logger.warning(
                f'divisor={divisor} lets groups end at widths that are no multiples of '
                f'{RUNNER_DIVISOR}: counts go down, but the time in onnxruntime may '
                'even rise (docs/performance.md)'
            )
        whole = np.flatnonzero(self.pruner.limits.smallest(units.sizes) == units.sizes)
        if len(whole):
            names = [units.grouping.groups[g].name for g in whole]
            self.runner.logger.info(
                f'{len(whole)} groups are too narrow to lose channels under '
                f'divisor={divisor}, min_channels, max_ratio and ratios: '
                f'{", ".join(names)}'
            )

    def log_step(self, step: PruneStep) -> None:
        """Log and plot a pruning step."""
        scalars = {
            f'pruning/{cost}_{kind}': value
            for cost, kinds in costs_in_numbers(
                step.totals, self.pruner.units.full
            ).items()
            for kind, value in kinds.items()
        }
        self.runner.visualizer.add_scalars(scalars, step=self.runner.iter + 1)
        # The schedule may wait, as a linear one does ahead of its line.
        waits = not len(step.units) and not step.exhausted
        why = ' (ahead of schedule)' if waits else ''
        self.runner.logger.info(
            f'pruned {len(step.units)} units{why}, '
            f'{self.pruner.units.kept.sum()} remain: '
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

    def _eta(self) -> str:
        """Return the time to the last target at the pace so far."""
        gap = self._gap()
        covered = self._first_gap - gap
        if covered <= 0:
            return 'unknown'
        seconds = (time.time() - self._started) * gap / covered
        return str(datetime.timedelta(seconds=int(seconds)))


def costs_text(pruner: ChannelPruner) -> str:
    """Return the remaining costs and their shares of the full ones, for people."""
    now, full = pruner.units.totals, pruner.units.full
    return ', '.join(
        f'{cost.label} {now[name] / cost.scale:.4g} {cost.unit} '
        f'({now.ratio(name, full):.1%})'
        for name, cost in pruner.units.costs.counters.items()
    )
