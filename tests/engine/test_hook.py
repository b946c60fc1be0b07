"""The hook in MMEngine's runner: when it prunes, what it logs, saves and stops."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from support.configs import small_prune_config
from support.toy_runner import hook_of

from mmgfp import ChannelPruningHook, PruningConfig
from mmgfp.utils.errors import ConfigError, TraceError


def test_run_stops_at_the_target_with_one_named_artifact(pruning_run):
    runner, pruner = pruning_run.runner, hook_of(pruning_run.runner).pruner
    ratio = pruner.units.totals['macs'] / pruner.units.full['macs']
    assert runner.iter < pruning_run.config.train_cfg.max_iters
    assert runner.train_loop.stop_training
    assert 0.45 < ratio <= 0.5
    compact = [p.name for p in pruning_run.artifact.parent.glob('*flops*.pth')]
    assert compact == ['retinanet_r18_fpn_digits_prune_flops50.pth']


def test_artifact_is_compact_and_loads_weights_only(pruning_run):
    checkpoint = torch.load(pruning_run.artifact, weights_only=True)
    pruner = hook_of(pruning_run.runner).pruner
    parameters = dict(pruner.model.named_parameters())
    weights = checkpoint['state_dict']
    saved = sum(t.numel() for n, t in weights.items() if n in parameters)
    assert saved == pruner.units.totals['params'] < pruner.units.full['params']
    assert checkpoint['meta']['dataset_meta']['classes'][3] == '3'
    assert checkpoint['meta']['costs']['macs']['ratio'] <= 0.5
    assert checkpoint['prune_structure'] == pruner.units.structure().to_dict()


def test_scalars_reach_the_visualizer(pruning_run):
    (path,) = Path(pruning_run.config.work_dir).glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ratios = [r['pruning/macs_ratio'] for r in rows if 'pruning/macs_ratio' in r]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] <= 0.5


def test_log_says_what_is_left_and_what_stays(pruning_run):
    (path,) = Path(pruning_run.config.work_dir).glob('*/*.log')
    text = path.read_text()
    assert 'bbox_head.retina_cls keeps channels: an output' in text
    assert 'memory' in text and 'eta to the target' in text
    assert 'following channels through the loss' in text
    assert 'the run stops' in text


def test_checkpoints_carry_the_state_of_pruning(pruning_run):
    path = next(Path(pruning_run.config.work_dir).glob('iter_*.pth'))
    state = torch.load(path, weights_only=False)['pruner']
    assert state['iteration'] == int(path.stem.split('_')[1])
    assert len(state['kept']) == hook_of(pruning_run.runner).pruner.units.grouping.units


def test_schedule_that_ends_early_says_so_and_saves(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(
        sys.modules, 'jinja2', None
    )  # a report needs it, a run does not
    config = small_prune_config(tmp_path, units_per_step=5)
    config.train_cfg.max_iters = 3
    runner = Runner.from_cfg(config)
    runner.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        runner.train()
    pruner = hook_of(runner).pruner
    ratio = pruner.units.totals['macs'] / pruner.units.full['macs']
    assert f'reached flops={ratio:.4f}' in caplog.text
    assert 'no report: ConfigError: the package jinja2 must be installed' in caplog.text
    (saved,) = Path(config.work_dir).glob('*_unfinished.pth')
    artifact = torch.load(saved, weights_only=True)
    assert artifact['prune_structure'] == pruner.units.structure().to_dict()
    assert artifact['meta']['iter'] == 3


def test_several_targets_give_one_artifact_each(tmp_path):
    targets = [dict(flops=0.9), dict(memory=0.8)]
    config = small_prune_config(tmp_path, target=targets, units_per_step=120)
    Runner.from_cfg(config).train()
    costs = {}
    for path in Path(config.work_dir).glob('retina*.pth'):
        meta = torch.load(path, weights_only=True)['meta']
        costs[path.stem.rpartition('_')[2]] = meta['costs']
    assert costs.keys() == {'flops90', 'memory80'}
    assert 0.85 < costs['flops90']['macs']['ratio'] <= 0.9
    assert costs['memory80']['memory']['ratio'] <= 0.8


def test_resumed_run_continues_from_the_saved_masks(tmp_path):
    config = small_prune_config(tmp_path, units_per_step=10)
    config.train_cfg.max_iters = 4
    first = Runner.from_cfg(config)
    first.train()
    before = hook_of(first).pruner
    config.resume = True
    config.train_cfg.max_iters = 8
    config.experiment_name = 'resumed'
    second = Runner.from_cfg(config)
    second.train()
    after = hook_of(second).pruner
    assert after.iteration == 8
    assert not (after.units.kept & ~before.units.kept).any()
    assert (before.units.kept.sum() - after.units.kept.sum()) == 20
    assert (~before.units.kept).sum() == 20


def test_keep_that_matches_nothing_stops_the_run(tmp_path):
    config = small_prune_config(tmp_path, keep=['backbone.layer9'])
    with pytest.raises(ConfigError, match=r"keep must be .*\(got 'backbone.layer9'"):
        Runner.from_cfg(config).train()


def test_nothing_to_prune_stops_the_run(tmp_path):
    config = small_prune_config(tmp_path, keep=['*'])
    with pytest.raises(TraceError, match='at least one group .* kept as configured'):
        Runner.from_cfg(config).train()


def test_run_meets_its_target_in_the_given_iterations(tmp_path):
    config = small_prune_config(tmp_path, units_per_step=1, iterations=6, divisor=4)
    runner = Runner.from_cfg(config)
    runner.train()
    pruner = hook_of(runner).pruner
    assert runner.iter == pruner.iteration == 6
    assert 0.4 < pruner.units.totals['macs'] / pruner.units.full['macs'] <= 0.5
    assert next(Path(config.work_dir).glob('*_flops50.pth'))
    sizes = np.array([g.units for g in pruner.units.grouping.groups])
    shrunk = (sizes - pruner.units.removed)[pruner.units.removed > 0]
    assert len(shrunk) and not (shrunk % 4).any()


def test_kept_layers_keep_their_shape(tmp_path):
    config = small_prune_config(
        tmp_path, keep=['bbox_head.*', 'backbone.conv1'], target=dict(flops=0.8)
    )
    config.train_cfg.max_iters = 4
    runner = Runner.from_cfg(config)
    runner.train()
    compact = dict(hook_of(runner).pruner.compact().named_parameters())
    kept = [n for n in compact if n.startswith(('bbox_head', 'backbone.conv1'))]
    shapes = {n: p.shape for n, p in runner.model.named_parameters()}
    assert kept and all(compact[n].shape == shapes[n] for n in kept)
    assert any(compact[n].shape != shapes[n] for n in compact)


def test_pruned_columns_stay_at_zero_under_momentum(pruning_run):
    pruner = hook_of(pruning_run.runner).pruner
    parameters = dict(pruner.model.named_parameters())
    start, checked = 0, 0
    for group in pruner.units.grouping.groups:
        gone = ~pruner.units.kept[start : start + group.units]
        start += group.units
        for member in group.members:
            if member.role == 'in' and gone.any():
                index = torch.from_numpy(np.ravel(member.index[gone]))
                columns = parameters[member.name].index_select(member.dim, index)
                assert not columns.any()
                checked += columns.numel()
    assert checked


@pytest.mark.parametrize(
    ('hook', 'said', 'unsaid'),
    [
        (
            {},
            'too narrow to lose channels under divisor=8',
            'multiples of 8:',
        ),
        (dict(divisor=1), 'divisor=1 lets groups end at widths', 'too narrow'),
        (dict(divisor=4), 'divisor=4 lets groups end at widths', 'divisor=8'),
        (dict(divisor=16), 'too narrow to lose channels under divisor=16', 'may not'),
    ],
)
def test_runs_are_aligned_by_default_and_say_what_that_means(
    tmp_path, hook, said, unsaid
):
    config = small_prune_config(tmp_path, target=dict(flops=0.8))
    del config.custom_hooks[0]['divisor']
    config.custom_hooks[0].update(hook)
    runner = Runner.from_cfg(config)
    runner.train()
    [log] = (tmp_path / 'work').glob('*/*.log')
    text = log.read_text()
    assert said in text and unsaid not in text
    pruner = hook_of(runner).pruner
    divisor = hook.get('divisor', 8)
    units = pruner.units
    kept = (units.sizes - units.removed) * units.widths
    assert pruner.done and np.all(kept[units.removed > 0] % divisor == 0)


def test_a_whole_configuration_keeps_its_own_divisor():
    for given, divisor in (
        (None, 8),
        (dict(interval=5), 8),
        (dict(divisor=2), 2),
        (PruningConfig(interval=5), 1),
        (PruningConfig(divisor=32), 32),
    ):
        assert ChannelPruningHook(given).config.divisor == divisor
    assert ChannelPruningHook(dict(divisor=2), divisor=4).config.divisor == 4
