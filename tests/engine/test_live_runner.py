"""Live compaction in MMEngine's runner: averages, checkpoints, resuming, processes."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from support.configs import FASTER, slim, small_prune_config
from support.roundtrip import pruned_model, seeded_loss, traced
from support.runs import (
    Cut,
    artifacts,
    assert_ranks_agree,
    assert_same_end,
    ended,
    logged,
    steady_classifier,
    tiny_classifier,
    train,
)
from support.toy_runner import Call, hook_of, pruner_of, toy_loader, toy_runner
from support.toys import parameters_in

from mmgfp import FisherPruningHook, GroupFisherPruner, PruneStructure
from mmgfp.discovery.comparing import difference
from mmgfp.engine.runner_access import check_model_wrapper
from mmgfp.utils.errors import ConfigError


def validated(folder, compact_interval, averages):
    """A toy run with averaging and validation, to its target."""
    return toy_runner(
        folder,
        iters=40,
        hook=dict(units_per_step=4, compact_interval=compact_interval),
        hooks=[
            dict(type='EMAHook', momentum=0.3, update_buffers=averages),
            dict(type='CheckpointHook', by_epoch=False, interval=5),
        ],
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=40, val_interval=3),
        val_cfg=dict(type='ValLoop'),
        val_dataloader=toy_loader(4, count=4),
        val_evaluator=dict(type='NoMetric'),
    )


def test_run_with_a_loss_scaler_ends_like_a_masked_one(tmp_path):
    """Gradients overflow at first; the scaler finds out on parameters that are new."""
    optim = dict(
        type='CpuAmpOptimWrapper',
        optimizer=dict(type='SGD', lr=1e-6, momentum=0.9),
        scaler=dict(init_scale=2.0**122, growth_interval=5),
    )
    model = dict(type='ToyDetector', double=False, factor=2.0**8)
    results = []
    for every in (None, 1):
        hook = dict(units_per_step=3, compact_interval=every, target=dict(flops=0.2))
        folder = tmp_path / f'{every}'
        runner = toy_runner(folder, 12, model=model, hook=hook, optim=optim)
        runner.train()
        results.append(runner)
    masked, live = map(pruner_of, results)
    assert masked.units.kept.tolist() == live.units.kept.tolist()
    assert not live.units.in_model.all()
    scales = [r.optim_wrapper.loss_scaler.get_scale() for r in results]
    assert scales[0] == scales[1] < 2.0**122


def artifact(runner):
    (path,) = Path(runner.work_dir).glob('*_flops50.pth')
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize('buffers', [False, True])
def test_averaged_and_validated_run_ends_like_a_masked_one(tmp_path, buffers):
    folders = {None: tmp_path / 'masked', 1: tmp_path / 'live'}
    runners = [validated(folder, n, averages=buffers) for n, folder in folders.items()]
    for runner in runners:
        runner.train()
    masked, live = map(artifact, runners)
    assert masked['prune_structure'] == live['prune_structure']
    assert masked['meta']['iter'] == live['meta']['iter']
    for key in ('state_dict', 'source_state_dict'):
        for name, tensor in masked[key].items():
            torch.testing.assert_close(tensor, live[key][name], msg=f'{key} {name}')
    assert not pruner_of(runners[1]).units.in_model.all()
    (hook,) = [h for h in runners[1].hooks if isinstance(h, EMAHook)]
    averaged = hook.ema_model
    kept = averaged.module.state_dict()
    assert all(kept[n].shape == t.shape for n, t in averaged.avg_parameters.items())


def test_checkpoint_of_a_cut_model_holds_its_structure(tmp_path):
    """Any tool can build the model of it, as of an artifact."""
    runner = validated(tmp_path, 1, averages=False)
    runner.train()
    path = Path(runner.work_dir) / 'iter_5.pth'
    checkpoint = torch.load(path, weights_only=False)
    structure = PruneStructure.from_dict(checkpoint['prune_structure'])
    in_model, kept = (checkpoint['pruner'][k] for k in ('in_model', 'kept'))
    assert torch.equal(in_model, kept) and not in_model.all()
    small = pruned_model(dict(type='ToyDetector'), path)
    small.load_state_dict(checkpoint['state_dict'], strict=True)
    kept = structure.kept['net.stage2.weight'][0]
    assert small.net.stage2.out_channels == len(kept) < 6


def test_config_that_prunes_validates_too(tmp_path):
    """Where there is no optimizer."""
    assert validated(tmp_path, 1, averages=False).val() == {'images': 4}


@pytest.mark.parametrize(
    ('every', 'expected'),
    [(1, [2, 4, 6, 8]), (3, [4, 6]), (4, [4, 8]), (5, [6]), (100, [])],
)
def test_model_is_cut_at_decisions_after_so_many_iterations(tmp_path, every, expected):
    sizes = []

    def note(runner):
        sizes.append(parameters_in(runner.model))

    hook = dict(compact_interval=every, target=dict(flops=0.11))
    toy_runner(tmp_path, 9, hook=hook, hooks=[Call(after_train_iter=note)]).train()
    assert [n for n in range(2, 10) if sizes[n - 1] != sizes[n - 2]] == expected


def test_detector_ends_like_a_masked_one(tmp_path):
    """RetinaNet with AdamW and clipping, at the demo's precision."""
    results = []
    for every in (None, 2):
        hook = dict(compact_interval=every, units_per_step=60)
        config = small_prune_config(tmp_path / f'{every}', **hook)
        config.train_dataloader.dataset.data_root = str(tmp_path / 'digits') + '/'
        runner = Runner.from_cfg(config)
        runner.train()
        results.append(runner)
    masked, live = (hook_of(r).pruner for r in results)
    assert masked.units.kept.tolist() == live.units.kept.tolist()
    assert masked.units.totals == live.units.totals and masked.reached == live.reached
    assert live.units.in_model.sum() < len(live.units.in_model)
    one, two = (p.compact().state_dict() for p in (masked, live))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_stage_detector_computes_what_it_did(tmp_path):
    found = traced(slim(FASTER), 64)
    model, calls = found.model.double(), found.calls
    calls.data['inputs'] = calls.data['inputs'].double()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    pruner = GroupFisherPruner(model, interval=1, units_per_step=60)
    pruner.prepare(calls.steady_loss, calls.forward, 2, calls.profile(model))
    for _ in range(3):
        optimizer.zero_grad()
        seeded_loss(calls, model).backward()
        optimizer.step()
        pruner.step()
        with torch.no_grad():
            before = [calls.forward(model.eval()), seeded_loss(calls, model)]
        assert pruner.compact_([optimizer])
        with torch.no_grad():
            after = [calls.forward(model.eval()), seeded_loss(calls, model)]
        assert difference(before, after) < 1e-9
    assert model.roi_head.bbox_head.fc_cls.in_features < 12
    assert not pruner.units.kept.all()


# -- interruptions ------------------------------------------------------------------


def cut_classifier(folder, every=3):
    config = tiny_classifier(folder)
    config.custom_hooks[0].compact_interval = every
    config.custom_hooks.append(dict(type='EMAHook', momentum=0.2))
    return config


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    config = cut_classifier(tmp_path_factory.mktemp('whole'))
    assert train(config) == [0]
    return config


def test_killed_run_ends_like_the_whole_one(whole, tmp_path):
    """With momentum and an average, once at a decision and once between two."""
    config = cut_classifier(tmp_path)
    assert train(config, cut=Cut('backward', 6)) == [-9]
    assert train(config, resume=True, cut=Cut('end', 10)) == [-9]
    assert train(config, resume=True) == [0]
    assert_same_end(config, whole)
    assert 'the pruned units are cut out' in logged(config)


def test_weights_of_a_cut_model_are_refused_for_the_whole_one(whole, tmp_path):
    config = cut_classifier(tmp_path)
    config.load_from = str(Path(whole.work_dir) / 'iter_14.pth')
    config.resume = False
    assert train(config) == [2]
    assert 'as in the model that is pruned' in logged(config)


# -- several processes ----------------------------------------------------------------


def test_processes_cut_alike_and_end_like_masked_ones(tmp_path):
    masked, live = (steady_classifier(tmp_path / n, 2) for n in ('masked', 'live'))
    live.custom_hooks[0].compact_interval = 5
    for config in (masked, live):
        assert train(config, processes=2) == [0, 0]
    assert ended(live)['kept'] == ended(masked)['kept']
    assert_ranks_agree(live)
    weights = [ended(config)['weights'] for config in (live, masked)]
    small, full = (sum(t.numel() for t in w.values()) for w in weights)
    assert small < full
    one, two = (torch.load(artifacts(c)[0], weights_only=True) for c in (masked, live))
    for name, tensor in one['state_dict'].items():
        other = two['state_dict'][name]
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_resumed_processes_end_like_uninterrupted_ones(tmp_path):
    whole, config = (steady_classifier(tmp_path / n, 2) for n in 'ab')
    for each in (whole, config):
        each.custom_hooks[0].compact_interval = 5
    assert train(whole, processes=2) == [0, 0]
    assert train(config, cut=Cut('decided', 13), processes=2) == [-9, -9]
    assert train(config, resume=True, processes=2) == [0, 0]
    assert_same_end(config, whole)
    assert_ranks_agree(config)


# -- what is refused ----------------------------------------------------------------


def test_other_wrappers_are_refused(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    MODEL_WRAPPERS.register_module(module=Wrapper, force=True)
    try:
        runner = toy_runner(tmp_path, hook=dict(compact_interval=2))
        check_model_wrapper(runner)
        runner.model = Wrapper(runner.model)
        with pytest.raises(ConfigError, match=r'wrapper_cfg.type .*\(got Wrapper'):
            runner.train()
    finally:
        MODEL_WRAPPERS.module_dict.pop('Wrapper')
    assert any(isinstance(h, FisherPruningHook) for h in runner.hooks)
