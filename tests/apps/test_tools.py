"""The command-line tools, run as a user runs them; bad input gives one line."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from support.configs import FASTER, MASK, PRUNE_CONFIG, slim
from support.roundtrip import traced
from support.tooling import ROOT, load_tool

from mmgfp import PruneStructure, compact_
from mmgfp.apps.cli import load_config
from mmgfp.discovery.dead import DeadBranches
from mmgfp.discovery.unit_sets import random_units
from mmgfp.engine.artifact import save_artifact
from mmgfp.engine.deploy import Deployable
from mmgfp.engine.model_building import build_model
from mmgfp.surgery.structure import shapes_of

DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits.py'


def error_line(done):
    """The one line that a failed tool prints after whatever libraries say."""
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
    return line


def test_analyze_prints_and_writes_what_can_be_pruned(run_tool, tmp_path):
    out = tmp_path / 'report.json'
    done = run_tool('analyze.py', DEMO, '--input-shape', 3, 64, 64, '--json', out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    units = sum(group['units'] for group in report['groups'])
    assert f'{units} units in {len(report["groups"])} groups' in done.stdout
    outputs = {'bbox_head.retina_cls', 'bbox_head.retina_reg'}
    assert {f['layer'] for f in report['frozen']} == outputs
    kept = 9 * (10 + 4)  # anchors times (classes + box sides)
    modules = build_model(load_config(str(DEMO))).modules()
    total = sum(m.out_channels for m in modules if isinstance(m, torch.nn.Conv2d))
    channels = pytest.approx(1 - kept / total)
    assert report['coverage'] == {'channels': channels, 'macs': 1.0}


def test_analyze_says_how_small_a_model_can_get(run_tool, tmp_path):
    """And what a run would refuse, in its words."""
    out, prune = tmp_path / 'out.json', DEMO.with_name(f'{DEMO.stem}_prune.py')
    divisor = 'custom_hooks.0.divisor=256'  # wider than any layer
    command = ('analyze.py', prune, '--json', out, '--cfg-options')
    done = run_tool(*command, divisor, "custom_hooks.0.keep=['neck*']")
    report, said = json.loads(out.read_text()), ' '.join(done.stdout.split())
    assert report['least'] == dict(macs=1, memory=1, params=1)
    assert report['limited_by'] == ['keep', 'min_channels', 'divisor=256']
    assert (
        'the smallest model allowed (keep, min_channels, divisor=256) has MACs 100.0%'
        in said
    )
    assert 'pruning would be refused: target.flops must be at least 1, which' in said
    assert 'or give a smaller divisor: divisor=1 leaves 0.' in said
    done = run_tool('analyze.py', prune, '--json', out)
    report = json.loads(out.read_text())
    assert report['limited_by'] == ['min_channels', 'divisor=4']
    assert report['least']['macs'] < 0.1
    assert 'refused' not in done.stdout and 'refused' not in report


def test_analyze_counts_at_the_size_of_the_hook(run_tool, tmp_path):
    out = tmp_path / 'report.json'
    config = DEMO.with_name(f'{DEMO.stem}_prune.py')
    done = run_tool('analyze.py', config, '--json', out)
    said = f'for one 3x128x128 image, as the pruning hook in {config.name} says'
    assert said in ' '.join(done.stdout.split()), done.stderr
    assert 'MACs 0.09882 G' in done.stdout
    report = json.loads(out.read_text())
    assert report['input_shape'] == [3, 128, 128]
    assert round(report['macs'] / 1e9, 5) == 0.09882  # as in docs/results.md
    # Without a hook, that of the images in testing, as the one command takes it.
    shown = load_config(str(DEMO))
    for step in shown.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (96, 64)
    result = load_tool('analyze').analyze(shown, None, None, False)
    assert result['input_shape'] == [3, 64, 96]
    assert result['input_shape_from'] == 'as images are resized for testing'


def test_analyze_names_the_groups_that_the_divisor_keeps_whole(capsys):
    tool, cfg = load_tool('analyze'), load_config(str(DEMO))
    cfg.model.backbone.base_channels = 8
    cfg.model.neck.update(in_channels=[8, 16, 32, 64])
    result = tool.analyze(cfg, None, (3, 64, 64), False)
    narrow = [g['name'] for g in result['groups'] if g['units'] == 8]
    assert narrow and result['narrow'] == {'divisor': 8, 'names': tuple(narrow)}
    tool.show(result, Console(width=200))
    said = f'{len(narrow)} groups are too narrow to lose channels under divisor=8: '
    assert f'{said}{narrow[0]}' in capsys.readouterr().out
    cfg.custom_hooks = [dict(type='ChannelPruningHook', divisor=1)]
    result = tool.analyze(cfg, None, (3, 64, 64), False)
    assert result['narrow'] == {'divisor': 1, 'names': ()}
    tool.show(result, Console(width=200))
    assert 'too narrow' not in capsys.readouterr().out


def test_latency_is_profiled_and_predicted(run_tool, tmp_path):
    """Once measured, the file says what the model takes; another size is refused."""
    pytest.importorskip('onnxruntime')
    slim_down = (
        'model.backbone.base_channels=8',
        'model.neck.in_channels=[8,16,32,64]',
    )
    sized = ('--input-shape', 3, 64, 64, '--cfg-options', *slim_down)
    table, out = tmp_path / 'table.json', tmp_path / 'report.json'
    command = ('profile_latency.py', DEMO, '--out', table, '--cuts', 8, '--check', 1)
    done = run_tool(*command, *sized)
    assert done.returncode == 0, done.stderr
    assert 'image (3, 64, 64), as --input-shape says' in done.stdout
    assert 'cut 12 of 12, the whole model' in done.stdout
    assert 'error: median' in done.stdout and 'share: median' in done.stdout
    analyze = ('analyze.py', DEMO, '--latency-profile', table, '--json', out)
    done = run_tool(*analyze, *sized)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report['latency'] > 0
    assert report['latency_profile'].startswith('onnxruntime')
    assert 'latency is predicted for onnxruntime' in done.stdout
    done = run_tool(*analyze, '--cfg-options', *slim_down, '--input-shape', 3, 32, 32)
    assert 'input_shape must be (3, 64, 64)' in error_line(done)


@pytest.mark.parametrize(
    ('config', 'shape', 'expected'),
    [
        (
            'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
            (3, 800, 1280),
            dict(macs=238.54e9, params=37.97e6, memory=297.46e6),
        ),
        (
            'mmpretrain::resnet/resnet50_8xb32_in1k.py',
            (3, 224, 224),
            dict(macs=4.089e9, params=25.55e6, memory=11.11e6),
        ),
    ],
)
def test_analyze_gives_the_papers_costs(run_tool, tmp_path, config, shape, expected):
    out = tmp_path / 'report.json'
    done = run_tool('analyze.py', config, '--input-shape', *shape, '--json', out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {k: report[k] for k in expected} == pytest.approx(expected, rel=1e-3)


def test_deploy_writes_a_folder_and_a_summary(run_tool, pruning_run, tmp_path):
    saved = tmp_path / 'config.py'
    pruning_run.config.dump(saved)
    out = tmp_path / 'out'
    command = ('deploy_pruned.py', saved, pruning_run.artifact, '--out', out)
    done = run_tool(*command, '--rounds', 2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['input_shape'] == [3, 64, 64]
    assert summary['pruned']['macs'] <= 0.5 * summary['original']['macs']
    for key in ('latency_ms', 'latency_cpu_ms', 'onnxruntime_ms', 'onnxruntime_cpu_ms'):
        assert summary['pruned'][key] > 0
        assert f'{summary["pruned"][key.replace("_ms", "_ratio")]:.1%}' in done.stdout
    meta = torch.load(pruning_run.artifact, weights_only=True)['meta']
    assert summary['pruned']['macs'] == meta['costs']['macs']['remaining']
    for runtime in ('PyTorch', 'onnxruntime'):
        assert f'CPU latency, {runtime} (ms)' in done.stdout
        assert f'processor time, {runtime} (ms)' in done.stdout
    # Costs of the file are those at the size that was asked for.
    weights = out / f'{pruning_run.artifact.stem}.pth'
    command = ('deploy_pruned.py', out / f'{weights.stem}.py', weights)
    sized = ('--out', tmp_path / 'small', '--input-shape', 3, 32, 32)
    assert run_tool(*command, *sized, '--rounds', 0).returncode == 0
    other = torch.load(tmp_path / 'small' / weights.name, weights_only=True)['meta']
    deployed = json.loads((tmp_path / 'small/summary.json').read_text())['pruned']
    assert other['costs']['macs']['remaining'] == deployed['macs']
    assert deployed['macs'] < summary['pruned']['macs']
    assert sorted(p.name for p in out.iterdir()) == [
        'retinanet_r18_fpn_digits_prune_flops50.pth',
        'retinanet_r18_fpn_digits_prune_flops50.py',
        'structure.json',
        'summary.json',
    ]


@pytest.mark.parametrize(
    ('shape', 'is_whole', 'why'),
    [
        ((3, 64, 64), True, ''),
        ((3, 32, 64), True, 'another image size'),
        ((3, 64, 64), False, 'the model with all branches'),
    ],
)
def test_a_predicted_latency_is_of_one_model_and_size(shape, is_whole, why, capsys):
    costs = {'macs': {'ratio': 0.5}, 'latency': {'remaining': 1.0, 'ratio': 0.5}}
    meta = {'input_shape': [3, 64, 64], 'costs': costs}
    item = Deployable({}, PruneStructure(), None, None, meta)
    left = load_tool('deploy_pruned').without_stale_predictions(item, shape, is_whole)
    assert ('latency' in left.meta['costs']) == (not why)
    assert left.meta['costs']['macs'] == costs['macs']
    said = capsys.readouterr().out
    assert why in said and ('left out' in said) == bool(why)


def test_deploy_names_files_alike_when_it_tells_of_modules_that_stay(
    pruning_run, tmp_path, monkeypatch, capsys
):
    tool = load_tool('deploy_pruned')
    told = DeadBranches(reasons={'backbone.spare': 'it is not called'})
    monkeypatch.setattr(tool, 'without_dead_branches', lambda cfg, item: (item, told))
    config, out = tmp_path / 'config.py', tmp_path / 'out'
    pruning_run.config.dump(config)
    args = [config, pruning_run.artifact, '--out', out, '--name', 'small']
    argv = ['deploy_pruned.py', *map(str, args), '--rounds', '0']
    monkeypatch.setattr('sys.argv', argv)
    tool.main()
    said = capsys.readouterr().out
    assert 'backbone.spare gets no gradient, but stays' in said
    names = {path.name for path in out.iterdir()}
    assert names == {'small.pth', 'small.py', 'structure.json', 'summary.json'}
    assert all(f'{out / name}' in said.splitlines()[-1] for name in names)


@pytest.mark.parametrize('name', [FASTER, MASK])
def test_deploy_times_two_stages_on_proposals_of_their_own(run_tool, tmp_path, name):
    config = slim(name)
    config.dump(tmp_path / 'config.py')
    found = traced(config, 64)
    groups = found.grouping.groups
    kept = random_units(groups, 0.3, np.random.default_rng(0))
    structure = PruneStructure.of(groups, kept, shapes_of(found.model))
    small = compact_(found.model, structure)
    meta = {'input_shape': (3, 64, 96)}
    save_artifact(tmp_path / 'small.pth', small, structure, meta)
    command = ['deploy_pruned.py', tmp_path / 'config.py', tmp_path / 'small.pth']
    done = run_tool(*command, '--out', tmp_path / 'out', '--rounds', 1)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / 'out/summary.json').read_text())
    assert summary['input_shape'] == [3, 64, 96]
    for key in ('latency_ms', 'onnxruntime_ms'):
        assert min(summary[name][key] for name in ('original', 'pruned')) > 0
    assert summary['pruned']['macs'] < summary['original']['macs']


def test_deploy_refuses_and_writes_nothing(run_tool, pruning_run, tmp_path):
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(pruning_run.artifact.read_bytes()[:5000])
    done = run_tool('deploy_pruned.py', PRUNE_CONFIG, cut, '--out', tmp_path / 'out')
    line = error_line(done)
    assert f'{cut} must be a checkpoint that loads' in line
    assert not (tmp_path / 'out').exists()
    command = ['deploy_pruned.py', PRUNE_CONFIG, pruning_run.artifact]
    done = run_tool(*command, '--out', tmp_path / 'out')
    assert 'must be of shape' in error_line(done)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['/nowhere/config.py'], 'config must be a config file'),
        (['mmdet::retinanet/no_such.py'], 'config must be a config file'),
        ([DEMO, '/nowhere/weights.pth'], 'checkpoint must be a checkpoint file'),
        ([DEMO, '--input-shape', 1, 64, 64], 'input_shape must be (C, H, W)'),
    ],
)
def test_analyze_says_what_is_wrong_in_one_line(run_tool, arguments, words):
    assert words in error_line(run_tool('analyze.py', *arguments))


@pytest.mark.parametrize(
    ('option', 'words'),
    [
        ('custom_hooks.0.intervall=3', 'pruning.intervall must be one of its'),
        ('custom_hooks.0.target.flops=1.5', 'target.flops must be a ratio'),
    ],
)
def test_train_says_what_is_wrong_in_one_line(run_tool, tmp_path, option, words):
    data = tmp_path / 'digits'
    spec = ['train_dataloader.dataset.spec.num_train=8', 'load_from=None']
    spec += [f'data_root={data}', 'train_dataloader.dataset.spec.num_val=2']
    options = ('--work-dir', tmp_path / 'work', '--cfg-options', option, *spec)
    done = run_tool('train.py', PRUNE_CONFIG, *options)
    assert words in error_line(done)


def test_train_misses_its_data_in_one_line(run_tool, tmp_path):
    config = ROOT / 'configs/bccd/retinanet_mobilenetv2_fpn_bccd.py'
    done = run_tool('train.py', config, '--cfg-options', f'data_root={tmp_path}/none/')
    assert f'must be present at {tmp_path}/none/' in error_line(done)


def test_train_and_test_refuse_a_truncated_checkpoint(run_tool, pruning_run, tmp_path):
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(pruning_run.artifact.read_bytes()[:5000])
    words = f'{cut} must be a checkpoint that loads'
    done = run_tool('test.py', DEMO, cut, '--work-dir', tmp_path / 'work')
    assert words in error_line(done)
    options = ('--cfg-options', f'load_from={cut}', f'data_root={tmp_path}/digits/')
    done = run_tool('train.py', DEMO, '--work-dir', tmp_path / 'work', *options)
    assert words in error_line(done)
    assert not (tmp_path / 'work').exists()
