"""Layers that are refitted at the decisions of a run, in the runner."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from support.configs import FASTER, small_prune_config
from support.runs import (
    Cut,
    assert_equal,
    assert_ranks_agree,
    assert_same_end,
    ended,
    logged,
    steady_classifier,
    tiny_classifier,
    train,
)
from support.small_configs import detection
from support.toy_runner import Call, pruner_of, toy_loader, toy_runner
from torch.utils.data import IterableDataset

from mmgfp.compensation.reports import Compensated
from mmgfp.discovery.comparing import difference
from mmgfp.engine import refitting
from mmgfp.engine.refitting import forget_directions
from mmgfp.surgery.compact import compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.units import UnitState
from mmgfp.utils.errors import ConfigError

#: Half of the images of `ToyImages` two by two, so that decisions draw others.
FISHER = dict(method='fisher', images=6)
HOOK = dict(interval=3, units_per_step=8, target=dict(flops=0.3), compensate=FISHER)


@pytest.fixture
def results(monkeypatch):
    """What `compensate` gives in a run, in order."""
    given, real = [], refitting.compensate

    def spy(*args):
        given.append(real(*args))
        return given[-1]

    monkeypatch.setattr(refitting, 'compensate', spy)
    return given


def without_refitting(model, grouping, kept, calls, config):
    """The compact model as it was cut, after all batches were run and loaded."""
    for call in calls:
        call(copy.deepcopy(model).eval())
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(model))
    return Compensated(compact(model, structure), (), ())


# -- what is written back -------------------------------------------------------------


@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize('method', ['fisher', 'least_squares', 'bn'])
def test_model_is_what_compensation_gave(tmp_path, results, method, every):
    """And its average, bit by bit; training goes on from there."""
    seen = []

    def compare(runner):
        pruner = pruner_of(runner)
        if len(results) == 2 * len(seen):
            return
        seen.append(pruner.units.kept.sum())
        (ema,) = [h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)]
        for live, result in zip((pruner.model, ema), results[-2:], strict=True):
            expected = result.model.state_dict()
            compacted = pruner.compact(live)
            assert_equal(compacted.state_dict(), expected)
            images = torch.randn(2, 3, 16, 16, dtype=torch.double)
            with torch.no_grad():
                outputs = [
                    copy.deepcopy(m).eval()(images) for m in (live, result.model)
                ]
            assert difference(*outputs) < 1e-9

    class Early(Call):  # after the pruning hook, before the average moves on
        priority = 'ABOVE_NORMAL'

    hook = HOOK | dict(compensate=FISHER | dict(method=method), compact_interval=every)
    model = dict(type='ToyDetector', frozen_norm=False)
    ema = dict(type='EMAHook', momentum=0.3)
    hooks = [ema, Early(after_train_iter=compare)]
    runner = toy_runner(tmp_path, 10, hook=hook, hooks=hooks, model=model)
    runner.train()
    assert len(seen) > 1 and (np.diff(seen) < 0).all()
    assert all(bool(r.refitted) == (method != 'bn') for r in results)


def test_targets_are_saved_with_refitted_weights(tmp_path, results):
    """Refitted on so few images that there are just two batches."""
    few = dict(method='fisher', images=3)
    hook = HOOK | dict(units_per_step=25, target=dict(flops=0.5), compensate=few)
    runner = toy_runner(tmp_path, 4, hook=hook)
    runner.train()
    (path,) = tmp_path.glob('work/*_flops50.pth')
    saved = torch.load(path, weights_only=True)['state_dict']
    assert_equal(saved, dict(results[0].model.state_dict()))


def test_error_falls_against_the_same_cut(tmp_path):
    """Held-out errors in the log: as cut, and as refitted."""
    hook = HOOK | dict(compensate='least_squares')
    runner = toy_runner(tmp_path, 10, hook=hook)
    runner.train()
    log = next(tmp_path.glob('work/*/*.log')).read_text()
    lines = re.findall(r'(\d+) of (\d+) layers .* error (\S+) -> (\S+) \(', log)
    assert len(lines) > 1
    for refitted, layers, before, after in lines:
        assert 0 < int(refitted) <= int(layers) and float(after) < float(before)


def test_nothing_changes_where_nothing_goes(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(refitting, 'compensate', refuse)
    nothing = np.array([], dtype=int)
    monkeypatch.setattr(UnitState, 'select', lambda *args: (nothing, nothing))
    runner = toy_runner(tmp_path, 4, hook=HOOK)
    runner.train()
    assert pruner_of(runner).iteration == 4 and pruner_of(runner).units.kept.all()


# -- what stays as it is --------------------------------------------------------------


def test_stream_of_data_and_random_numbers_is_untouched(tmp_path, monkeypatch):
    """Of a run with dropout, flips in this process and momentum."""
    monkeypatch.setattr(refitting, 'compensate', without_refitting)
    ends = []
    for method in ('none', 'fisher'):
        config = tiny_classifier(tmp_path / method)
        config.custom_hooks[0].compensate = method
        config.train_dataloader.dataset.flip = True
        config.experiment_name = f'untouched_{method}'
        runner = Runner.from_cfg(config)
        runner.train()
        kept = pruner_of(runner).units.kept.tolist()
        state = runner.model.state_dict(), runner.optim_wrapper.state_dict()
        ends.append(dict(kept=kept, state=list(state), next=torch.rand(3)))
    assert_equal(*ends)
    assert not all(ends[0]['kept'])


def test_images_follow_from_seed_and_iteration(tmp_path, monkeypatch):
    drawn = []

    def note(model, batches):
        drawn.append(torch.cat([data['inputs'] for data in batches]).sum((1, 2, 3)))
        return [lambda m, d=data: m(**d, mode='loss')['loss'] for data in batches]

    monkeypatch.setattr(refitting, 'recorded_losses', note)
    for folder in 'ab':
        toy_runner(tmp_path / folder, 6, hook=HOOK).train()
    one, two = drawn[:2], drawn[2:]
    assert_equal(one, two)
    assert not torch.equal(*one) and all(len(set(d.tolist())) == 6 for d in drawn)


@pytest.mark.parametrize('kind', ['SGD', 'Adam'])
def test_momentum_of_refitted_weights_begins_anew(kind):
    first, kept = {
        'SGD': ('momentum_buffer', None),
        'Adam': ('exp_avg', 'exp_avg_sq'),
    }[kind]
    options = {'momentum': 0.9} if kind == 'SGD' else {}
    refitted, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = getattr(torch.optim, kind)([refitted, other], lr=0.1, **options)
    (refitted * 2 + other * 2).sum().backward()
    optimizer.step()
    forget_directions(optimizer, [refitted])
    one, two = optimizer.state[refitted], optimizer.state[other]
    assert not one[first].any() and two[first].all()
    assert kept is None or torch.equal(one[kept], two[kept])
    assert not refitted.grad.any() and other.grad.all()


def test_momentum_is_reset_in_the_run_where_weights_are_others(tmp_path, results):
    seen = []

    def note(runner):
        if len(results) > len(seen):
            state = runner.optim_wrapper.optimizer.state
            names = dict(runner.model.named_parameters())
            changed = {r.layer for r in results[-1].refitted}
            still = {n for n, p in names.items() if state[p]['momentum_buffer'].any()}
            seen.append((changed, still, names.keys()))

    toy_runner(tmp_path, 7, hook=HOOK, hooks=[Call(after_train_iter=note)]).train()
    assert len(seen) == 2
    for changed, still, names in seen:
        assert changed and not changed & still
        weights = {n for n in names if n.endswith('weight')}
        assert weights - changed <= still


def test_waiting_gradients_and_mixed_precision(tmp_path, results):
    """A decision between two steps of the optimizer, computed in single precision."""
    types, seen = set(), []

    def note(runner):
        if len(results) > len(seen):
            names = dict(runner.model.named_parameters())
            seen.append({n for n, p in names.items() if p.grad.any()})
            types.update(t.dtype for t in results[-1].model.state_dict().values())

    optim = dict(type='CpuAmpOptimWrapper', accumulative_counts=2)
    optim |= dict(dtype=torch.bfloat16)
    options = dict(model=dict(type='ToyDetector', double=False), optim=optim)
    hook = HOOK | dict(compensate=FISHER | dict(method='least_squares'))
    hooks = [Call(after_train_iter=note)]
    toy_runner(tmp_path, 4, hook=hook, hooks=hooks, **options).train()
    (waiting,) = seen
    refitted = {r.layer for r in results[0].refitted}
    assert refitted and waiting and not waiting & refitted
    assert types <= {torch.float32, torch.int64}
    assert max(r.before for r in results[0].refitted) > 0


# -- real models ----------------------------------------------------------------------


def detector(folder, name):
    if name is None:
        return small_prune_config(folder)
    pruning = small_prune_config(folder)
    config = detection(folder, name)
    for key in ('custom_hooks', 'train_cfg', 'work_dir', 'visualizer'):
        config[key] = pruning[key]
    config.train_dataloader.batch_size = 2
    return config


@pytest.mark.parametrize('name', [None, FASTER], ids=['retinanet', 'faster'])
def test_detectors_are_refitted(tmp_path, name, results):
    config = detector(tmp_path, name)
    options = dict(method='fisher', images=8, rows=512)
    hook = dict(interval=3, units_per_step=60, compensate=options)
    config.custom_hooks[0].update(hook)
    config.train_cfg.max_iters = 4
    config.experiment_name = f'refitted_{name is None}'
    seen = []

    def compare(runner):
        if len(results) > len(seen):
            pruner = pruner_of(runner)
            seen.append(results[-1])
            assert_equal(pruner.compact().state_dict(), seen[-1].model.state_dict())

    runner = Runner.from_cfg(config)
    runner.register_hook(Call(after_train_iter=compare), 'LOWEST')
    runner.train()
    (result,) = seen
    assert len(result.refitted) > 5
    for layer in result.refitted:
        assert math.isfinite(layer.after) and layer.after < layer.before
    reached = {r.layer.split('.')[0] for r in result.layers}
    assert reached >= {'backbone', 'neck', 'roi_head' if name else 'bbox_head'}


# -- interruptions, several processes -------------------------------------------------


def refitted_classifier(folder, every=None):
    config = tiny_classifier(folder)
    hook = config.custom_hooks[0]
    hook.update(compensate=dict(method='fisher', images=12), compact_interval=every)
    config.custom_hooks.append(dict(type='EMAHook', momentum=0.2))
    return config


@pytest.mark.parametrize('every', [pytest.param(None, marks=pytest.mark.slow), 3])
def test_killed_run_ends_like_the_whole_one(tmp_path, every):
    """Once right before a decision, once right after one."""
    whole = refitted_classifier(tmp_path / 'whole', every)
    assert train(whole) == [0]
    config = refitted_classifier(tmp_path / 'cut', every)
    assert train(config, cut=Cut('stepped', 6)) == [-9]
    assert train(config, resume=True, cut=Cut('end', 9)) == [-9]
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)
    assert 'layers refitted' in logged(whole)


def test_processes_are_refitted_alike(tmp_path):
    config = steady_classifier(tmp_path, 2)
    config.custom_hooks[0].compensate = dict(method='fisher', images=8)
    assert train(config, processes=2) == [0, 0]
    assert_ranks_agree(config)
    assert 'layers refitted' in logged(config)
    one, two = (ended(config, rank)['weights'] for rank in range(2))
    assert_equal(one, two)  # statistics too, which do not move in this run


@pytest.mark.slow
def test_resumed_processes_end_like_uninterrupted_ones(tmp_path):
    whole, config = (steady_classifier(tmp_path / n, 2) for n in 'ab')
    for each in (whole, config):
        each.custom_hooks[0].compensate = dict(method='fisher', images=8)
    assert train(whole, processes=2) == [0, 0]
    assert train(config, cut=Cut('decided', 10), processes=2) == [-9, -9]
    assert train(config, resume=True, processes=2) == [0, 0]
    assert_same_end(config, whole)
    assert_ranks_agree(config)


# -- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('value', 'words'),
    [
        ('obs', r"compensate must be one of \('none', 'fisher', .*\(got 'obs'\)"),
        (3, r'compensate must be one of .*\(got 3\)'),
        (dict(method='fisher', image=3), r"compensate\.image .* did you mean 'images'"),
        (dict(images=1), r'compensate\.images must be a whole number of at least 2'),
        (dict(method='bn', rows=0), 'rows must be a whole number'),
    ],
)
def test_options_are_refused_by_name(value, words):
    with pytest.raises(ConfigError, match=words):
        refitting.PruningConfig(compensate=value)


def test_data_without_numbers_are_refused_before_training(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield {'inputs': torch.zeros(3, 16, 16)}

    DATASETS.register_module(module=Stream, force=True)
    try:
        loader = toy_loader(1) | dict(dataset=dict(type='Stream'), sampler=None)
        runner = toy_runner(tmp_path, hook=HOOK, train_dataloader=loader)
        with pytest.raises(ConfigError, match=r'dataset must .*\(got Stream\)'):
            runner.train()
    finally:
        DATASETS.module_dict.pop('Stream')
