"""What a pruning run plots, as the backends of MMEngine's visualizer keep it."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.visualization import Visualizer
from support.toy_runner import pruner_of, toy_runner

from mmgfp.engine.plotting import plot_step, scalars_of
from mmgfp.selection.costs import Totals
from mmgfp.selection.targets import Target


def decided(importance):
    """A model of two groups, of 4 and 2 units, at a decision that leaves 3 and 2."""
    kept = np.array([True, True, False, True, True, True])
    units = SimpleNamespace(
        full=Totals({'macs': 100, 'memory': 10, 'params': 1000}),
        kept=kept,
        removed=np.array([1, 0]),
        sizes=np.array([4, 2]),
    )
    targets = (Target('flops', 0.5), Target('memory', 0.9))
    pruner = SimpleNamespace(units=units, config=SimpleNamespace(targets=targets))
    totals = Totals({'macs': 80, 'memory': 8, 'params': 900})
    return pruner, SimpleNamespace(totals=totals, importance=importance)


def test_scalars_of_a_decision():
    importance = np.array([1.0, 2.0, 99.0, np.nan, np.inf, 3.0])
    assert scalars_of(*decided(importance)) == pytest.approx(
        {
            'pruning/macs_remaining': 80,
            'pruning/macs_ratio': 0.8,
            'pruning/memory_remaining': 8,
            'pruning/memory_ratio': 0.8,
            'pruning/params_remaining': 900,
            'pruning/params_ratio': 0.9,
            'pruning/way_to_flops50': 0.4,
            'pruning/way_to_memory90': 1,
            # Of 1, 2 and 3: what was pruned, and what is not known, do not count.
            'pruning/importance_low': 1.2,
            'pruning/importance_median': 2,
            'pruning/importance_high': 2.8,
        }
    )
    for unknown in (None, np.full(6, np.nan)):
        names = scalars_of(*decided(unknown))
        assert not [name for name in names if 'importance' in name]


class Recorder:
    """A backend of the visualizer whose scalars are noted."""

    def __init__(self, said, experiment=None):
        self.said = said
        if experiment is not None:
            self.experiment = experiment

    def add_scalars(self, scalars, step, file_path=None):
        self.said.append((step, scalars['pruning/way_to_flops50']))


def test_histograms_go_where_there_are_some():
    said = []
    writer = SimpleNamespace(
        add_histogram=lambda name, values, step: said.append((step, name, [*values]))
    )
    wandb = SimpleNamespace(
        Histogram=list,
        log=lambda data, commit: said.append((commit, data)),
    )
    visualizer = Visualizer()
    for experiment in (None, writer, wandb):
        backend = Recorder(said, experiment)
        visualizer._vis_backends = {'only': backend}
        plot_step(visualizer, *decided(None), 7)
    name, left = 'pruning/channels_left', [0.75, 1.0]
    scalars = (7, pytest.approx(0.4))
    # W&B is to take both as one step.
    histograms = [(7, name, left), (False, {name: left})]
    assert said == [scalars, histograms[0], scalars, histograms[1], scalars]


def test_tensorboard_has_the_course_of_a_run(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backends = [dict(type='TensorboardVisBackend')]
    shown = dict(type='Visualizer', name=tmp_path.name, vis_backends=backends)
    runner = toy_runner(tmp_path, visualizer=shown, hook=dict(units_per_step=1))
    runner.train()
    pruner = pruner_of(runner)
    (folder,) = (tmp_path / 'work').glob('*/vis_data')
    events = EventAccumulator(str(folder))
    events.Reload()
    ratio, way = (
        events.Scalars(f'pruning/{n}') for n in ('macs_ratio', 'way_to_flops50')
    )
    assert [e.step for e in ratio] == [*range(2, 2 * len(ratio) + 1, 2)]
    units = pruner.units
    assert ratio[-1].value == pytest.approx(units.totals.ratio('macs', units.full))
    for share, done in zip(ratio, way, strict=True):
        assert done.value == pytest.approx(min(2 * (1 - share.value), 1), abs=1e-6)
    histogram = events.Histograms('pruning/channels_left')[-1].histogram_value
    left = 1 - units.removed / units.sizes
    assert histogram.num == len(left) and histogram.sum == pytest.approx(left.sum())
    assert (histogram.min, histogram.max) == pytest.approx((left.min(), left.max()))
    low, high = (
        events.Scalars(f'pruning/importance_{n}')[0].value for n in ('low', 'high')
    )
    assert 0 <= low <= high
