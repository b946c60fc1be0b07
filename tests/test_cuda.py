"""Runs on a GPU: its kernels, its autograd, half precision, NCCL.

The rest of the suite runs on the CPU wherever it is started, but for what goes through
MMEngine's runner, which takes a GPU where there is one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from support.configs import small_prune_config
from support.device_runs import (
    CRITERIA,
    DETECTORS,
    MODELS,
    assert_same_run,
    prune,
    run,
)
from support.pruning import importance_of, prepared
from support.runs import artifacts
from support.small_configs import config_of
from support.toy_runner import hook_of
from support.toys import TOYS, images, square_loss
from torch import nn

from mmgfp.compensation.options import CompensationConfig
from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.kinds import build_sparsifier
from mmgfp.sparsity.semi_structured import has_sparse_cores, to_semi_structured
from mmgfp.without_training import prune_without_training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
CPU, CUDA = 'cpu', 'cuda'
TOLERANCE = dict(rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def single_precision():
    """Products in single precision, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize('build', MODELS.values(), ids=MODELS)
def test_a_run_is_that_of_the_cpu(build):
    assert_same_run(run(build, CUDA), run(build, CPU), **TOLERANCE)


@pytest.mark.parametrize('criterion', CRITERIA, ids=str)
def test_every_criterion(criterion):
    build = MODELS['BN and a residual']
    found, expected = (run(build, d, criterion=criterion) for d in (CUDA, CPU))
    assert_same_run(found, expected, **TOLERANCE)


@pytest.mark.parametrize('name', DETECTORS)
def test_models_of_openmmlab(name):
    """RoIs are sampled by the GPU's own random numbers, so that other units may go."""
    build = DETECTORS[name]()
    expected, found = prune(build, CPU).units, prune(build, CUDA).units
    names = [[g.name for g in units.grouping.groups] for units in (expected, found)]
    assert names[0] == names[1]
    assert (~found.kept).sum() == 40
    if 'R-CNN' not in name:
        assert np.array_equal(found.kept, expected.kept)


@pytest.mark.parametrize('name', [n for n in DETECTORS if 'R-CNN' not in n])
def test_importance_of_an_iteration(name):
    build, found = DETECTORS[name](), {}
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        model, calls = build(device)
        pruner = prepared(model, calls.loss, calls.forward)
        calls.loss(model).backward()
        pruner.step()
        found[device] = importance_of(pruner)
    assert found[CPU].any()
    largest = found[CPU].max()
    np.testing.assert_allclose(found[CUDA], found[CPU], rtol=0.01, atol=1e-5 * largest)


@pytest.mark.parametrize('method', ['fisher', 'least_squares'])
@pytest.mark.parametrize('toy', TOYS)
def test_compensation_without_training(toy, method):
    """As on the CPU: the layers that are refitted, their errors, and the outputs."""
    results = {}
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        net = toy().to(device)
        batches = [images(4, seed=seed).to(device) for seed in range(4)]
        losses = [lambda m, x=x: square_loss(m(x)) for x in batches]
        results[device] = prune_without_training(
            net,
            losses,
            lambda m, x=batches[0]: m(x),
            4,
            {'target': dict(flops=0.6)},
            CompensationConfig(method=method),
            rounds=1,
        )
    expected, found = results[CPU], results[CUDA]
    assert next(found.model.parameters()).is_cuda
    assert found.structure == expected.structure
    pairs = zip(found.rounds[0].layers, expected.rounds[0].layers, strict=True)
    for layer, reference in pairs:
        assert (layer.layer, layer.reason) == (reference.layer, reference.reason)
        assert layer.before == pytest.approx(reference.before, rel=0.01, abs=1e-6)
        assert layer.after == pytest.approx(reference.after, rel=0.05, abs=1e-6)


def amp(dtype):
    return dict(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')


@pytest.mark.parametrize(
    'wrapper', [{}, amp('float16'), amp('bfloat16')], ids=['single', 'half', 'bfloat']
)
def test_the_hook_prunes_cuts_and_saves(wrapper, tmp_path):
    cfg = small_prune_config(tmp_path, compact_interval=2)
    cfg.optim_wrapper.update(wrapper)
    runner = Runner.from_cfg(cfg)
    runner.train()
    pruner = hook_of(runner).pruner
    assert next(runner.model.parameters()).is_cuda
    assert not pruner.units.kept.all()
    x = torch.randn(2, 3, 64, 64, device=CUDA)
    model = runner.model.eval()
    with torch.no_grad():
        outputs = model(x, mode='tensor'), pruner.compact().eval()(x, mode='tensor')
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert all(torch.isfinite(t).all() for level in outputs for o in level for t in o)
    assert artifacts(cfg)


def test_a_resumed_run_ends_like_the_whole_one(tmp_path):
    ends = []
    for folder, stops in (('whole', [12]), ('halves', [8, 12])):
        for stop in stops:
            cfg = small_prune_config(tmp_path / folder, target=dict(flops=0.1))
            cfg.train_cfg.max_iters = stop
            cfg.resume = stop != stops[0]
            if cfg.resume:
                cfg.load_from = str(tmp_path / folder / 'work/iter_8.pth')
            cfg.randomness = dict(seed=0, deterministic=True)
            runner = Runner.from_cfg(cfg)
            runner.train()
        ends.append((hook_of(runner).pruner.units.kept, runner.model.state_dict()))
    (kept, weights), (resumed_kept, resumed_weights) = ends
    assert not kept.all()
    assert np.array_equal(resumed_kept, kept)
    torch.testing.assert_close(resumed_weights, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_the_tools_from_a_config_that_knows_nothing_of_pruning(
    kind, run_tool, tmp_path, monkeypatch
):
    """Pruned in half precision, RetinaNet with NCCL too; deployed and profiled."""
    config, path = config_of(tmp_path, kind), tmp_path / 'net.py'
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    config.custom_hooks = [
        dict(
            type='mmgfp.FisherPruningHook',
            interval=1,
            units_per_step=100,
            divisor=1,
            target=dict(flops=0.7),
        )
    ]
    config.dump(path)

    def tool(*command):
        done = run_tool(*command)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout

    work = tmp_path / 'work'
    options = ['--amp']
    if kind == 'retinanet':  # as torchrun starts one of one process
        options += ['--launcher', 'pytorch']
        names = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_PORT=29611)
        for name, value in {**names, 'MASTER_ADDR': '127.0.0.1'}.items():
            monkeypatch.setenv(name, str(value))
    tool('train.py', path, '--work-dir', work, *options)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    pruned = next(work.glob('*_flops70.pth'))
    tool('deploy_pruned.py', path, pruned, '--out', tmp_path / 'out')
    table = tmp_path / 'table.json'
    shape = ['--input-shape', 3, 64, 64, '--cuts', 8]
    tool(
        'profile_latency.py',
        path,
        '--runtime',
        'torch',
        '--device',
        CUDA,
        *shape,
        '--out',
        table,
    )
    assert json.loads(table.read_text())['origin']['device'] == CUDA


@pytest.mark.parametrize(
    'options', [dict(sparsity=0.7), dict(kind='movement'), dict(kind='nm')], ids=str
)
def test_zeros_are_those_of_the_cpu(options):
    """After a step of an optimizer, too, that undoes a scale of the loss itself."""
    kept = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        model, x = model.to(device), torch.randn(2, 4, 3, 3).to(device)
        sparsifier = build_sparsifier(model, SparsityConfig(**options))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
        sparsifier.attach(optimizer)
        scaler = torch.amp.GradScaler(device)
        for decides in (False, True, False):
            if decides:
                sparsifier.decide(sparsifier.config.density)
            optimizer.zero_grad()
            scaler.scale(model(x).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        kept.append(sparsifier.kept_bits())
        for name, mask in sparsifier.masks.items():
            assert not sparsifier.weights[name][~mask].any()
    assert (kept[0] == kept[1]).all() and not kept[0].all()


def test_linear_layers_compute_on_sparse_tensor_cores():
    if not has_sparse_cores(torch.device(CUDA)):
        pytest.skip('no sparse tensor cores')
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    model = model.half().to(CUDA).eval()
    build_sparsifier(model, SparsityConfig(kind='nm')).decide(0.5)
    x = torch.randn(64, 128).half().to(CUDA)
    with torch.inference_mode():
        expected = model(x)
        assert to_semi_structured(model) == {}
        found = model(x)
    assert 'SemiStructured' in type(model[0].weight.data).__name__
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
