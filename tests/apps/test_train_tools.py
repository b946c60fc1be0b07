"""tools/train.py and tools/test.py."""

import json
import sys

import pytest
import torch
from mmengine.config import Config
from support.tooling import ROOT, load_tool

from mmgfp.apps.cli import run_cli
from mmgfp.utils.errors import ConfigError

PRUNE = [str(ROOT / 'configs/demo/retinanet_r18_fpn_digits_prune.py'), '--cfg-options']

train, tester = load_tool('train'), load_tool('test')


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
        (train, ['no.py'], 'config must be a config file (got no.py'),
        (train, ['mmdet::no/no.py'], 'config must be a config file (got mmdet::no'),
        (train, ['{tmp}/c.py'], 'train_dataloader.dataset must be present at no/train'),
        (tester, ['{tmp}/c.py', 'no.pth'], 'checkpoint must be a checkpoint file'),
        (tester, ['{tmp}/c.py', '{tmp}/w.pth'], 'test_dataloader.dataset must be'),
        (tester, ['{tmp}/c.py', '{tmp}/w.pth', '--out', 'x.txt'], 'must be a .pkl'),
        (train, [*PRUNE, 'load_from=x.pth'], 'load_from must be a checkpoint file'),
    ],
)
def test_what_is_wrong_gets_one_line(tool, args, words, tmp_path, monkeypatch, capsys):
    (tmp_path / 'c.py').write_text(CONFIG)
    torch.save({'state_dict': {'w': torch.ones(1)}}, tmp_path / 'w.pth')
    with pytest.raises(SystemExit) as stop:
        call(tool, monkeypatch, *(arg.format(tmp=tmp_path) for arg in args))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert words in error


def test_resume_takes_the_newest_checkpoint_if_there_is_one(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='a.pth', resume=False))
    train.apply_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == ('a.pth', False)
    newest = tmp_path / 'iter_5.pth'
    newest.touch()
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    train.apply_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == (str(newest), True)
    with pytest.raises(ConfigError, match='--resume must be a checkpoint file'):
        train.apply_resume(cfg, 'no.pth')


def test_amp_switches_the_wrapper():
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    train.enable_amp(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(ConfigError, match=r"--amp .*\(got 'ApexOptimWrapper'"):
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
