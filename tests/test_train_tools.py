"""tools/train.py, tools/test.py and tools/pipeline.py."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmgfp.cli import run_cli
from mmgfp.errors import ConfigError

TOOLS = Path(__file__).parent.parent / 'tools'
DEMO = TOOLS.parent / 'configs/demo'


def load(name):
    spec = importlib.util.spec_from_file_location(f'tool_{name}', TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train, tester, pipeline = load('train'), load('test'), load('pipeline')


def call(module, monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, args)])
    run_cli(module.main)


CONFIG = """
train_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='no/train.json'))
test_dataloader = train_dataloader
"""


@pytest.mark.parametrize(
    ('tool', 'args', 'words'),
    [
        (train, ['no.py'], 'config: expected a config file, got no.py'),
        (train, ['mmdet::no/no.py'], 'config: expected a config file, got mmdet::no'),
        (train, ['{tmp}/c.py'], 'train_dataloader.dataset: expected data at no/train'),
        (tester, ['{tmp}/c.py', 'no.pth'], 'checkpoint: expected a checkpoint file'),
        (tester, ['{tmp}/c.py', '{tmp}/w.pth'], 'test_dataloader.dataset: expected'),
        (tester, ['{tmp}/c.py', '{tmp}/w.pth', '--out', 'x.txt'], 'expected a .pkl'),
    ],
)
def test_what_is_missing_gets_one_line(
    tool, args, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / 'c.py').write_text(CONFIG)
    torch.save({'state_dict': {}}, tmp_path / 'w.pth')
    with pytest.raises(SystemExit) as stop:
        call(tool, monkeypatch, *(arg.format(tmp=tmp_path) for arg in args))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert words in error


def test_missing_baseline_is_said(tmp_path, monkeypatch, capsys):
    config = DEMO / 'retinanet_r18_fpn_digits_prune.py'
    with pytest.raises(SystemExit):
        call(train, monkeypatch, config, '--cfg-options', f'load_from={tmp_path}/x.pth')
    assert 'load_from: expected a checkpoint file' in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_as_configured(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='a.pth', resume=False))
    train.apply_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == ('a.pth', False)


def test_resume_takes_the_newest_checkpoint(tmp_path):
    newest = tmp_path / 'iter_5.pth'
    newest.touch()
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    cfg = Config(dict(work_dir=str(tmp_path), load_from='a.pth', resume=False))
    train.apply_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == (str(newest), True)


def test_resume_from_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match='--resume: expected a checkpoint file'):
        train.apply_resume(Config(dict(work_dir=str(tmp_path))), 'no.pth')


def test_amp_switches_the_wrapper():
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    train.enable_amp(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(ConfigError, match="--amp: .* got 'ApexOptimWrapper'"):
        train.enable_amp(cfg)


def test_auto_scale_lr_needs_a_base_batch_size():
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16)))
    train.enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    with pytest.raises(ConfigError, match='--auto-scale-lr'):
        train.enable_auto_scale_lr(Config(dict()))


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('DetVisualizationHook', dict(draw=True, test_out_dir='out')),
        ('VisualizationHook', dict(enable=True, out_dir='out')),
    ],
)
def test_show_speaks_each_librarys_words(kind, expected, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tool', 'c.py', 'x.pth', '--show-dir', 'out'])
    args = tester.parse_args()
    cfg = Config(dict(default_hooks=dict(visualization=dict(type=kind))))
    tester.show_results(cfg, args)
    hook = dict(cfg.default_hooks.visualization)
    assert {key: hook[key] for key in expected} == expected


def test_metrics_are_written(tmp_path):
    tester.write_metrics(str(tmp_path / 'sub/m.json'), {'coco/bbox_mAP': 0.5})
    assert json.loads((tmp_path / 'sub/m.json').read_text()) == {'coco/bbox_mAP': 0.5}


@pytest.fixture
def fake_tools(tmp_path, monkeypatch):
    """A tool that appends its arguments to a file, or fails if told to."""
    (tmp_path / 'fake.py').write_text(
        'import sys\n'
        f'with open({str(tmp_path / "calls")!r}, "a") as file:\n'
        '    print(*sys.argv[1:], file=file)\n'
        'print("Epoch(train) [1]"); print("chatter")\n'
        'sys.exit(3 if "fail" in sys.argv else 0)\n'
    )
    monkeypatch.setattr(pipeline, 'TOOLS', tmp_path)
    return lambda: (tmp_path / 'calls').read_text().splitlines()


def test_finished_stage_is_not_run_again(fake_tools, tmp_path):
    stages = pipeline.Pipeline(tmp_path / 'w', ['a=1'])
    for _ in range(2):
        stages.run('one', 'fake', 'x', options=['b=2'])
    assert fake_tools() == ['x --cfg-options b=2 a=1']
    assert stages.seconds('one') > 0
    stages.run('one', 'fake', 'y', options=[])  # another command: run
    assert fake_tools()[1:] == ['y --cfg-options a=1']


def test_failed_stage_stops_and_is_run_again(fake_tools, tmp_path):
    stages = pipeline.Pipeline(tmp_path / 'w', [])
    for _ in range(2):
        with pytest.raises(pipeline.StageError, match='one: expected exit status 0'):
            stages.run('one', 'fake', 'fail', options=[])
    assert len(fake_tools()) == 2


def test_progress_is_shown_and_the_rest_logged(fake_tools, tmp_path, capfd):
    stages = pipeline.Pipeline(tmp_path, [])
    stages.run('one', 'fake', options=[])
    shown = capfd.readouterr().out
    assert 'Epoch(train) [1]' in shown and 'chatter' not in shown
    assert 'chatter' in (tmp_path / 'logs/one.log').read_text()
    with pytest.raises(pipeline.StageError):
        stages.run('two', 'fake', 'fail', options=[])
    assert 'chatter' in capfd.readouterr().out  # all that a failure said last


def test_pruned_checkpoint_is_the_last_target_reached(tmp_path):
    with pytest.raises(pipeline.StageError, match='max_iters'):
        pipeline.pruned_checkpoint(tmp_path, 'configs/a_prune.py')
    for age, label in enumerate(['flops70', 'flops50', 'flops40_unfinished']):
        path = tmp_path / f'a_prune_{label}.pth'
        path.touch()
        os.utime(path, (age, age))
    found = pipeline.pruned_checkpoint(tmp_path, 'configs/a_prune.py')
    assert found.name == 'a_prune_flops50.pth'


def test_input_shape_is_the_hooks():
    config = str(DEMO / 'retinanet_r18_fpn_digits_prune.py')
    assert pipeline.input_shape(config) == (3, 128, 128)
    override = 'custom_hooks.0.input_shape=(3,64,96)'
    assert pipeline.input_shape(config, [override]) == (3, 64, 96)
    with pytest.raises(ConfigError, match='FisherPruningHook'):
        pipeline.input_shape(str(DEMO / 'retinanet_r18_fpn_digits.py'))


def test_options_are_parsed_like_the_other_tools_do():
    assert pipeline.parse_options([]) == {}
    assert pipeline.parse_options(['a.b=1', 'c=x/y.pth']) == {'a.b': 1, 'c': 'x/y.pth'}
