"""Time to half the MACs, with masks and with live compaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from benchmarks.discovering import unverified
from benchmarks.models import seeded, sgd, train_step
from mmgfp import GroupFisherPruner
from mmgfp.discovery.discover import Discovery
from mmgfp.runtimes.timing import (
    Times,
    ratio_text,
    ratios,
    spread,
    stopwatch,
    take_turns,
)
from mmgfp.utils.trial_runs import copy_module

TARGET = {'flops': 0.5}
#: Iterations of the runs that take turns, and from one decision to the next (the
#: paper's for detection).
ITERATIONS, INTERVAL = 200, 10
#: The same where the pace is counted: at most, and between decisions.
MOST, SHORT = 400, 2
LR = 1e-4
#: Runs that take turns, whether they cut the model at decisions, and their options.
RUNS: dict[str, tuple[bool, dict[str, Any]]] = {
    'masks': (False, {}),
    'live': (True, {}),
    'live, divisor 8': (True, {'divisor': 8}),
}
AUTO = f'auto, live, interval {SHORT}'
COUNTED = f'one unit at a time, interval {SHORT}'


def measure_schedule(
    model: nn.Module, calls: Any, repeats: int, device: str
) -> dict[str, Any]:
    """Times to the target, from decision to decision.

    Runs that meet it in the same number of iterations take turns, all iterations up to
    the next decision at a time: whatever comes after a model of other shapes has to get
    its kernels and its memory anew. One that takes as
    many units as are safe runs after them: its number of iterations is what counts. One
    unit at a time would take thousands of decisions. So these are counted by picking
    unit after unit on the statistics of the first ones, without training in between.

    Args:
        model: The model in training mode.
        calls: Its loss and outputs on a batch, as `BatchCalls` has them.
        repeats: Of no use here: each interval is another one.
        device: Where the model is.
    """
    discovery = unverified(model, calls)

    def begin(live: bool, **options: Any) -> Run:
        return Run(copy_module(model), calls, discovery, live, **options)

    train_step(copy_module(model), calls.loss)()  # what is slow for the first time only
    runs = {
        name: begin(live, iterations=ITERATIONS, **options)
        for name, (live, options) in RUNS.items()
    }
    actions = {name: run.interval for name, run in runs.items()}
    times = take_turns(actions, ITERATIONS // INTERVAL, device, warmup=0)
    runs[AUTO] = begin(True, units_per_step='auto', interval=SHORT)
    times[AUTO] = runs[AUTO].until_done(device)
    measured = {name: _facts(run, times[name]) for name, run in runs.items()}
    for name, (_, options) in RUNS.items():
        measured[name]['ratio'] = _ratios(times, name)
        if not options:
            measured[name]['alike'] = compare(runs[name].kept, runs['masks'].kept)
    once = begin(False, iterations=SHORT, interval=SHORT)
    once.until_done(device)
    decisions = once.removed
    measured[COUNTED] = {'decisions': decisions, 'iterations': decisions * SHORT}
    return {'runs': measured, 'times': times}


class Run:
    """Training that prunes.

    Args:
        model: What is pruned, in place.
        calls: Its loss on a batch.
        discovery: Its groups.
        live: Whether decisions cut the model, too.
        options: Of the pruner.

    Attributes:
        kept: The units that are left after each decision, (U,) each.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Any,
        discovery: Discovery,
        live: bool,
        **options: Any,
    ) -> None:
        options = {'interval': INTERVAL, 'target': TARGET, **options}
        self.pruner = GroupFisherPruner(model, **options)
        self.pruner.attach(discovery)
        self.optimizer = sgd(model, LR)
        self.live = live
        self.kept: list[np.ndarray] = []
        self._train = seeded(train_step(model, calls.loss, self.optimizer))

    @property
    def removed(self) -> int:
        """Units that have gone."""
        return int((~self.pruner.units.kept).sum())

    def step(self) -> None:
        """One iteration, with the decision and the cut that are due."""
        self._train()
        if self.pruner.step() is None:
            return
        self.kept.append(self.pruner.units.kept.copy())
        if self.live:
            self.pruner.compact_(optimizers=(self.optimizer,))

    def interval(self) -> None:
        """All iterations up to a decision."""
        for _ in range(self.pruner.config.interval):
            self.step()

    def until_done(self, device: str) -> list[dict[str, float]]:
        """Intervals up to the target, with their times."""
        times: list[dict[str, float]] = []
        while not self.pruner.done and self.pruner.iteration < MOST:
            with stopwatch(times, device):
                self.interval()
        return times


def _facts(run: Run, times: list[dict[str, float]]) -> dict[str, Any]:
    totals, full = run.pruner.units.totals, run.pruner.units.full
    return {
        'iterations': run.pruner.iteration,
        'reached': run.pruner.done,
        'macs': float(totals['macs'] / full['macs']),
        'units': run.removed,
        'seconds': {clock: sum(t[clock] for t in times) for clock in ('wall', 'cpu')},
    }


def _ratios(times: Times, name: str) -> dict[str, Any]:
    """The time of a run over that with masks: of all, and by quarter of the run."""

    def total(run: str) -> float:
        return sum(t['wall'] for t in times[run])

    of_each = ratios(times, name, 'masks', 'wall')
    length = len(of_each) // 4
    ends = range(0, 4 * length, length)
    quarters = [spread(of_each[start : start + length]) for start in ends]
    return {'all': total(name) / total('masks'), 'quarters': quarters}


def compare(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, Any]:
    """Count the decisions that two runs share, and the units in the end.

    Sums of what is cut and sums with zeros differ in the last bit. Sooner or later that
    decides between two units, and models of random weights soon differ in many then.

    Args:
        one: The units alive after each decision, (U,) each.
        other: Those of the other run.
    """
    pairs = zip(one, other, strict=False)  # one may be at its target before
    same = [np.array_equal(own, others) for own, others in pairs]
    gone, others = ~one[-1], ~other[-1]
    return {
        'same_decisions': same.index(False) if False in same else len(same),
        'decisions': max(len(one), len(other)),
        'share': float((gone & others).sum() / (gone | others).sum()),
    }


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for a page, by the label of what was measured and the run."""
    quarters = [f'quarter {number}' for number in range(1, 5)]
    rows = [['model', 'run', 'iterations', 'time (s)', 'to masks', *quarters]]
    rows[0].append('same decisions; units in the end')
    for label, measured in results.items():
        rows += [[label, name, *_cells(run)] for name, run in measured['runs'].items()]
    return rows


def _cells(run: dict[str, Any]) -> list[str]:
    if 'decisions' in run:
        return [f'{run["iterations"]} (counted, not run)', *[''] * 7]
    iterations = str(run['iterations'])
    if not run['reached']:
        iterations = f'{iterations}, given up at {run["macs"]:.0%} of the MACs'
    cells = [iterations, f'{run["seconds"]["wall"]:.3g}']
    if 'ratio' not in run:
        return [*cells, *[''] * 6]
    alike = '{same_decisions} of {decisions}; {share:.1%}'
    return [
        *cells,
        f'× {run["ratio"]["all"]:.3f}',
        *(ratio_text(quarter) for quarter in run['ratio']['quarters']),
        alike.format(**run['alike']) if 'alike' in run else '',
    ]
