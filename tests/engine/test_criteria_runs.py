"""Every criterion through the hook, on two detectors and a classifier."""

import pytest
import torch
from mmengine.runner import Runner
from support.runs import (
    Cut,
    assert_ranks_agree,
    assert_same_end,
    tiny_classifier,
    train,
)
from support.small_configs import config_of
from support.toy_runner import CpuAmpOptimWrapper, hook_of, pruner_of, toy_runner

from mmgfp.criteria.base import CRITERIA

RIVALS = [
    'taylor',
    dict(type='taylor', of='weights'),
    'l1',
    'l2',
    'fpgm',
    dict(type='bn_scale', sparsity=1e-4),
    'lamp',
    'activation',
    dict(type='activation', of='apoz'),
    'random',
]
#: Those that gather something between decisions, and one with a term of the loss.
STATEFUL = [RIVALS[i] for i in (0, 1, 5, 7)]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return {}, tmp_path_factory


def config_for(folders, kind):
    """A config of a kind of model, whose data are written once."""
    known, factory = folders
    if kind not in known:
        known[kind] = config_of(factory.mktemp(kind), kind)
    return known[kind].copy()


def pruned(config, folder, **options):
    """Prune by two decisions, and return the hook."""
    config.work_dir = str(folder)
    config.experiment_name = folder.name
    config.load_from = None
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=99)
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    config.param_scheduler = None
    config.randomness = dict(seed=0)
    for split in ('val', 'test'):
        config.update(
            {f'{split}_{x}': None for x in ('cfg', 'dataloader', 'evaluator')}
        )
    hook = dict(
        type='ChannelPruningHook',
        interval=1,
        units_per_step=10,
        divisor=1,
        target=dict(flops=0.3),
    )
    config.custom_hooks = [hook | options]
    if 'visualizer' in config:
        config.visualizer.name = folder.name
    runner = Runner.from_cfg(config)
    runner.train()
    return hook_of(runner)


@pytest.mark.parametrize('criterion', RIVALS, ids=str)
@pytest.mark.parametrize(
    'kind',
    [
        'classifier',
        pytest.param('retinanet', marks=pytest.mark.slow),
        pytest.param('faster', marks=pytest.mark.slow),
    ],
)
def test_run_prunes(kind, criterion, folders, tmp_path):
    hook = pruned(config_for(folders, kind), tmp_path, criterion=criterion)
    units = hook.pruner.units
    assert (~units.kept).sum() == 20
    (artifact,) = tmp_path.glob('*_unfinished.pth')
    costs = torch.load(artifact, weights_only=True)['meta']['costs']
    assert costs['macs']['ratio'] < 1


def test_every_criterion_is_run():
    run = {s if isinstance(s, str) else s['type'] for s in RIVALS}
    # Other tests of the same process may have registered criteria of their own.
    modules = {name: CRITERIA[name].__module__ for name in CRITERIA.names()}
    ours = {n for n, module in modules.items() if module.startswith('mmgfp.')}
    assert run == ours - {'fisher'}


def test_local_scope_prunes_all_groups_alike(folders, tmp_path):
    hook = pruned(
        config_for(folders, 'classifier'),
        tmp_path,
        criterion='l1',
        scope='local',
        ratios={'backbone.*': 0.5},
        target=dict(flops=0.6),
        schedule='one_shot',
        units_per_step=1,
    )
    units = hook.pruner.units
    shares = units.removed / units.sizes
    assert hook.pruner.done and shares.min() > 0
    # On the way to a half, each group is at the nearest number of units.
    assert (shares.max() - shares.min()) * units.sizes.min() <= 1


@pytest.mark.parametrize('criterion', STATEFUL, ids=str)
def test_resumed_run_ends_as_if_it_had_not_stopped(criterion, tmp_path):
    def build(name):
        config = tiny_classifier(tmp_path / name)
        config.custom_hooks[0].update(type='ChannelPruningHook', criterion=criterion)
        return config

    whole, cut = build('whole'), build('cut')
    assert train(whole) == [0]
    assert train(cut, cut=Cut('end', 8)) != [0]
    assert train(cut, resume=True) == [0]
    assert_same_end(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize('criterion', RIVALS, ids=str)
def test_processes_agree(criterion, tmp_path):
    config = tiny_classifier(tmp_path)
    config.custom_hooks[0].update(type='ChannelPruningHook', criterion=criterion)
    assert train(config, processes=2) == [0, 0]
    assert_ranks_agree(config)


def trained(folder, criterion, optim, interval=4, **runner):
    hook = dict(type='ChannelPruningHook', criterion=criterion, interval=interval)
    runner = toy_runner(folder, hook=hook, optim=optim, **runner)
    runner.train()
    return pruner_of(runner)


def assert_same_parameters(one, two):
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    for first, second in pairs:
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize('criterion', STATEFUL, ids=str)
def test_scale_of_the_loss_changes_nothing(criterion, tmp_path):
    scaler = dict(enabled=True, init_scale=1024.0)
    optim = dict(type=CpuAmpOptimWrapper.__name__, scaler=scaler)
    scaled = trained(tmp_path / 'scaled', criterion, optim)
    plain = trained(tmp_path / 'plain', criterion, {})
    assert scaled.units.kept.tolist() == plain.units.kept.tolist()
    assert_same_parameters(scaled, plain)


def test_sparsity_counts_once_in_accumulated_gradients(tmp_path):
    criterion = dict(type='bn_scale', sparsity=0.5)
    optim = dict(accumulative_counts=2)
    parts = trained(tmp_path / 'parts', criterion, optim, 99, iters=8, batch=2)
    whole = trained(tmp_path / 'whole', criterion, {}, 99, iters=4, batch=4)
    other = trained(tmp_path / 'other', 'bn_scale', {}, 99, iters=4, batch=4)
    assert_same_parameters(parts, whole)
    assert not torch.allclose(other.model.net.bn.weight, whole.model.net.bn.weight)
