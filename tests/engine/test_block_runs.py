"""Runs that lose residual blocks: trained, reloaded by config, deployed, exported."""

import json
import re
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from support.html import Page
from support.small_configs import config_of
from support.tooling import load_tool
from torch import nn

from mmgfp import PruneStructure
from mmgfp.discovery.comparing import difference
from mmgfp.discovery.probing import run
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.report.snapshot import read_snapshot


def run_of(config, folder, **options):
    """Train with pruning until a block or two are gone; return the runner."""
    config = config.copy()
    config.work_dir, config.experiment_name = str(folder), folder.name
    config.load_from, config.param_scheduler = None, None
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=60, val_interval=99)
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    config.randomness = dict(seed=0)
    for split in ('val', 'test'):
        names = (f'{split}_{x}' for x in ('cfg', 'dataloader', 'evaluator'))
        config.update(dict.fromkeys(names))
    if 'visualizer' in config:
        config.visualizer.name = folder.name
    hook = dict(type='ChannelPruningHook', interval=2, divisor=1, blocks=True)
    # So few channels may go that the target cannot be reached without a block.
    hook |= dict(target=dict(params=0.75), normalize='params', max_ratio=0.1)
    hook |= dict(units_per_step=10)
    config.custom_hooks = [hook | options]
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


@pytest.mark.parametrize('compact_interval', [None, 4])
@pytest.mark.parametrize(
    'kind',
    [
        'classifier',
        *(pytest.param(k, marks=pytest.mark.slow) for k in ('retinanet', 'faster')),
        pytest.param('mask', marks=pytest.mark.slow),
    ],
)
def test_a_model_loses_blocks(tmp_path, monkeypatch, capsys, kind, compact_interval):
    config = config_of(tmp_path, kind)
    runner = run_of(config, tmp_path / 'work', compact_interval=compact_interval)
    (pruner,) = (h.pruner for h in runner.hooks if hasattr(h, 'pruner'))
    (artifact,) = (tmp_path / 'work').glob('*params75*.pth')
    structure = PruneStructure.load(artifact)
    gone = structure.identities
    assert gone and all('layer' in name for name in gone)
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    # Each decision's counts, and what is left, blocks apart from channels.
    grouping, kept = pruner.units.grouping, pruner.units.kept
    blocks = len(grouping.blocks)
    line = r'pruned (\d+) units? and (\d+) blocks?(?: \(([^)]+)\))?, (.* remain):'
    units, counts, names, left = zip(*re.findall(line, log), strict=True)
    assert sum(map(int, units)) == sum(~kept[:-blocks])
    assert sum(map(int, counts)) == len(gone)
    assert sorted(', '.join(filter(None, names)).split(', ')) == sorted(gone)
    assert left[-1] == (
        f'{sum(kept[:-blocks])} of {len(kept) - blocks} units and '
        f'{blocks - len(gone)} of {blocks} blocks remain'
    )
    snapshot = read_snapshot(artifact, 'half')
    assert snapshot.gone == gone
    # The report has a row for each layer of the original, those of blocks included.
    shapes = pruner.units.shapes
    layers = [n for n, s in shapes.items() if n.endswith('.weight') and len(s) > 1]
    assert [f'{layer}.weight' for layer in snapshot.widths] == layers
    page = Page((tmp_path / 'work/report.html').read_text())
    _, rows = page.table('channels')
    for layer, (before, after) in rows.items():
        assert int(before.text) == shapes[f'{layer}.weight'][0]
        assert (after.text == '0 (removed)') == structure.is_gone(layer)

    # Masked, or cut, equals compact; and the model reloads by config.
    config.dump(tmp_path / 'whole.py')
    out = tmp_path / 'out'
    args = ['deploy_pruned.py', tmp_path / 'whole.py', artifact, '--out', out]
    args += ['--name', 'small', '--rounds', '1', '--input-shape', '3', '64', '64']
    monkeypatch.setattr(sys, 'argv', [*map(str, args), '--export', 'onnx'])
    capsys.readouterr()  # what the run has logged
    load_tool('deploy_pruned').main()
    said = capsys.readouterr().out
    assert f'the checkpoint is without {", ".join(gone)}\n' in said
    assert said.count(gone[0]) == 1
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['gone'] == list(gone)
    assert list(out.glob('*.onnx'))
    small = build_model(Config.fromfile(out / 'small.py'))
    weights = torch.load(out / 'small.pth', weights_only=True)['state_dict']
    small.load_state_dict(weights)
    assert read_snapshot(out / 'small.pth', 'half').widths == snapshot.widths
    assert all(isinstance(small.get_submodule(name), nn.Identity) for name in gone)
    assert type(small) is type(pruner.model)
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters == summary['pruned']['params']
    assert parameters == pruner.units.totals['params']
    calls = BatchCalls(small, demo_batch(config))
    with torch.no_grad():
        outputs = [run(m.double(), calls.forward) for m in (pruner.model, small)]
    assert difference(*outputs) < 1e-6

    # It trains.
    calls.loss(small.float().train()).backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize('dead', ['remove', 'keep'])
def test_the_dead_layer_of_mobilenet_behind_an_fpn(tmp_path, monkeypatch, capsys, dead):
    config = config_of(tmp_path, 'retinanet')
    backbone = dict(type='MobileNetV2', widen_factor=0.1, out_indices=(1, 2, 4, 6))
    config.model.backbone = backbone
    config.model.neck.in_channels = [8, 8, 16, 32]
    options = dict(target=dict(params=0.9), max_ratio=1.0)
    run_of(config, tmp_path / 'work', **options)
    (artifact,) = (tmp_path / 'work').glob('*params90*.pth')
    saved = torch.load(artifact, weights_only=True)['state_dict']
    assert 'backbone.conv2.conv.weight' in saved  # training and tools see all of it

    config.dump(tmp_path / 'whole.py')
    out = tmp_path / 'out'
    args = ['deploy_pruned.py', tmp_path / 'whole.py', artifact, '--out', out]
    args += ['--name', 'small', '--rounds', '0', '--input-shape', '3', '64', '64']
    args += ['--dead-branches', dead, '--export', 'onnx']
    monkeypatch.setattr(sys, 'argv', [*map(str, args)])
    capsys.readouterr()  # what the run has logged
    load_tool('deploy_pruned').main()
    summary = json.loads((out / 'summary.json').read_text())
    small = build_model(Config.fromfile(out / 'small.py'))
    weights = torch.load(out / 'small.pth', weights_only=True)['state_dict']
    small.load_state_dict(weights)
    is_gone = isinstance(small.backbone.conv2, nn.Identity)
    assert (
        is_gone == (dead == 'remove') == ('backbone.conv2' in summary.get('gone', ()))
    )
    said = capsys.readouterr().out
    # Once, beside the lines on files; blocks that were pruned on another line.
    assert said.count('backbone.conv2') == is_gone
    assert ('nothing reads backbone.conv2' in said) == is_gone
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters == summary['pruned']['params']
    names = [n for n in saved if n.startswith('backbone.conv2.')]
    assert any(n in weights for n in names) != is_gone
    # The same outputs and the same loss as with it.
    whole = build_model(Config(dict(config.to_dict(), model=dict(
        type='PrunedModel', architecture=config.model.to_dict(),
        structure=str(artifact), backbone=dict(init_cfg=None),
    ))))  # fmt: skip
    whole.load_state_dict(saved)
    calls = BatchCalls(small, demo_batch(config))
    with torch.no_grad():
        assert difference(*(run(m.eval(), calls.forward) for m in (whole, small))) == 0
    losses = [
        run(m.train(), calls.steady_loss, in_double=False) for m in (whole, small)
    ]
    assert losses[0] == losses[1]
