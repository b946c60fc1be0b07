"""What users get wrong with the tools is said in one line, before anything is done."""

import logging
import sys

import pytest
import torch
from support.tooling import ROOT, load_tool

from mmgfp.apps.cli import run_cli

DEMO = str(ROOT / 'configs/demo/retinanet_r18_fpn_digits.py')
PRUNE = DEMO.replace('.py', '_prune.py')
TUNE = DEMO.replace('.py', '_finetune.py')
TOOLS = {
    name: load_tool(name)
    for name in (
        *('train', 'test', 'analyze', 'deploy_pruned', 'prune', 'ablation'),
        *('compare', 'sensitivity', 'report'),
    )
}
ALL = [DEMO, PRUNE, TUNE, '--work-dir', '{tmp}/work']
GOAL = ['--work-dir', 'w', '--target', 'flops=0.5']
OWN = [DEMO, '--prune-config', PRUNE, '--finetune-config', TUNE]
NOWHERE = 'a folder to write to'
NO_FILE = ['--cfg-options', 'model.structure={tmp}/x.json']
FILES = {
    'net.onnx': '',
    'empty.py': '',
    'broken.py': 'raise RuntimeError("broken")',
    'list.json': '[1]',
    'typo.py': "model = dict(type='NoSuchNet')\n",
    'wrong.py': "model = dict(type='mmpretrain.ResNet', depth=18, width=3)\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Configs and checkpoints as users have them, some of no use."""
    # Loggers of earlier tests write to what these had captured, which is closed.
    monkeypatch.setattr(logging, 'raiseExceptions', False)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    torch.save([torch.ones(2)], tmp_path / 'tensors.pth')
    torch.save({'meta': {'epoch': 1}, 'optimizer': {}}, tmp_path / 'no_weights.pth')
    torch.save({'state_dict': [torch.ones(2)]}, tmp_path / 'listed.pth')
    torch.save({'state_dict': {'w': torch.ones(2)}, 'meta': 3}, tmp_path / 'plain.pth')
    return tmp_path


@pytest.mark.parametrize(
    ('tool', 'args', 'words'),
    [
        *[
            (tool, [DEMO, f'{{tmp}}/{name}.pth', *more], words)
            for name, words in [
                ('tensors', 'must hold a dict (got list)'),
                ('no_weights', "with weights in 'state_dict'"),
                ('listed', "with weights in 'state_dict'"),
            ]
            for tool, more in [('test', []), ('analyze', [])]
        ],
        *[
            ('deploy_pruned', [DEMO, f'{{tmp}}/{name}.pth', '--out', '{tmp}/o'], words)
            for name, words in [
                ('tensors', 'must hold a dict (got list)'),
                ('no_weights', "must be a checkpoint with 'state_dict'"),
                ('listed', "must be a checkpoint with 'state_dict'"),
                ('plain', 'must be of a pruned model'),
            ]
        ],
        *[
            ('deploy_pruned', [DEMO, '{tmp}/plain.pth', *options], words)
            for options, words in [
                (['--out', '{tmp}/plain.pth'], '--out must be a folder'),
                (['--out', '{tmp}/plain.pth/a/b'], '--out must be a folder'),
                (['--out', '{tmp}/o', '--name', '../x'], '--name must be a file name'),
                (['--out', '{tmp}/o', '--name', ''], '--name must be a file name'),
                (['--out', '{tmp}/o', '--name', 'x' * 300], '--name must be a file'),
            ]
        ],
        ('train', [DEMO, '--cfg-options', 'load_from={tmp}/listed.pth'], 'weights in'),
        ('train', [PRUNE, '--resume', '{tmp}/plain.pth'], 'without its progress'),
        ('train', ['{tmp}/empty.py'], 'must be one with model, train_dataloader'),
        ('test', ['{tmp}/empty.py', '{tmp}/plain.pth'], 'must be one with model, test'),
        ('test', [DEMO, '{tmp}/net.onnx'], 'add --runtime onnxruntime'),
        (
            'test',
            [DEMO, '{tmp}/list.json'],
            'weights (.pth) (got {tmp}/list',
        ),
        (
            'test',
            [DEMO, '{tmp}/plain.pth', '--runtime', 'openvino'],
            'without --runtime',
        ),
        *[
            (
                'deploy_pruned',
                [TUNE, '{tmp}/plain.pth', '--out', '{tmp}/o', *NO_FILE],
                w,
            )
            for w in ['--cfg-options model.structure=FILE', 'x.json must be a .json']
        ],
        ('analyze', ['{tmp}/empty.py'], 'config must be a model'),
        ('analyze', ['{tmp}/broken.py'], '(got {tmp}/broken.py (RuntimeError: broken'),
        ('analyze', ['{tmp}/list.json'], 'config must be a config file'),
        ('analyze', ['{tmp}'], 'config must be a config file'),
        ('analyze', ['{tmp}/typo.py'], 'NoSuchNet is not in'),
        ('analyze', ['{tmp}/wrong.py'], "unexpected keyword argument 'width'"),
        *[
            ('analyze', [DEMO, '--input-shape', *shape.split()], words)
            for shape, words in [
                ('3 0 64', 'input_shape must be (C, H, W) with C = 3'),
                ('3 -1 64', 'input_shape must be (C, H, W) with C = 3'),
                ('4 64 64', 'input_shape must be (C, H, W) with C = 3'),
                ('3 9000000 9000000', 'input_shape must be the size (C, H, W)'),
            ]
        ],
        *[
            (tool, [*start, '--cfg-options', option], '--cfg-options must be ')
            for tool, start in [
                ('analyze', [DEMO]),
                ('train', [PRUNE]),
                ('prune', [*OWN, '--work-dir', '{tmp}/work']),
                ('ablation', ALL),
            ]
            for option in [
                'model',
                'custom_hooks.7.x=3',
                'x=[1,(2',
                'model.type.x=2',
            ]
        ],
        ('ablation', [*ALL, '--variant', 'slow', 'interval'], 'KEY=VALUE'),
        ('prune', [*OWN[:-1], 'no.py', '--work-dir', 'w'], 'got no.py'),
        ('prune', [*OWN, '--work-dir', '{tmp}/plain.pth'], NOWHERE),
        *[
            (
                'prune',
                [*start, *['--work-dir', 'w', '--target', 'flops=0.5'], *args],
                words,
            )
            for start, args, words in [
                (['no.py', 'no.pth'], [], 'config must be a config file (got no.py'),
                ([DEMO, 'no.pth'], [], 'checkpoint must be a checkpoint file'),
                ([PRUNE], [], 'with FisherPruningHook); give that, or'),
                ([TUNE], [], 'finetune.py with a PrunedModel); give'),
                ([DEMO], ['--data-root', 'nowhere'], '--data-root must be a folder'),
                ([DEMO], ['--target', 'flops'], '--target must be KEY=VALUE'),
                ([DEMO], ['--target', 'speed=2'], 'target must be a cost among'),
                ([DEMO], ['--target', 'flops=2'], 'target.flops must be a ratio'),
                ([DEMO], ['--target', 'flops=.5', 'macs=.5'], 'targets that differ'),
                ([DEMO], ['--criterion', 'luck'], 'luck'),
                ([DEMO], ['--images', '9'], '--images must be given with --no-train'),
                (OWN, [], '--target must be given without --prune-config, which'),
                (OWN[:3], [], 'must be both (got one of them)'),
                ([DEMO], ['--no-train', '--epochs', '2'], 'given without --no-train'),
                ([DEMO], ['--no-train', '--dry-run'], 'given without --no-train'),
                ([DEMO], ['--no-train'], 'checkpoint must be given with --no-train'),
                ([DEMO], ['--export', 'tflite'], 'one of onnx'),
                ([DEMO], ['--nms'], '--nms must be given with --export'),
            ]
        ],
        ('prune', [DEMO, '--work-dir', 'w'], 'give --target flops=0.5, say'),
        ('ablation', [*ALL[:3], '--work-dir', '{tmp}/plain.pth/x'], NOWHERE),
        ('analyze', [DEMO, '--json', '{tmp}/plain.pth/r.json'], NOWHERE),
        ('compare', ['{tmp}/empty.py', '--work-dir', 'w'], 'with baseline, prune'),
        ('compare', [DEMO, '--work-dir', 'w'], 'must be one of its options'),
        *[
            ('sensitivity', [PRUNE, *args], words)
            for args, words in [
                (['{tmp}/no.pth', '--work-dir', 'w'], 'must be a checkpoint file'),
                (['{tmp}/plain.pth', '--work-dir', '{tmp}/plain.pth'], NOWHERE),
                (
                    ['{tmp}/plain.pth', '--work-dir', 'w', '--target', 'flops=2'],
                    'target.flops must be a ratio',
                ),
            ]
        ],
        ('test', [DEMO, '{tmp}/plain.pth', '--json', '{tmp}/plain.pth/r'], NOWHERE),
        *[
            ('report', args, words)
            for args, words in [
                (['{tmp}/no'], 'WORK_DIR must be the folder of a run (got nothing at'),
                (['{tmp}/plain.pth'], '(got the file {tmp}/plain.pth)'),
                (['{tmp}'], 'tensors.pth must hold a dict (got list)'),
                (['.', '--out', '{tmp}/no/r.html'], '--out must be a file to write'),
                (['.', '--out', '{tmp}'], '--out must be a file to write'),
                (['.', '--config', DEMO], 'given together (got --config alone)'),
                (
                    ['.', '--config', DEMO, '--checkpoints', '{tmp}/no.pth'],
                    '--checkpoints must be a checkpoint file',
                ),
            ]
        ],
    ],
)
def test_it_is_said_in_one_line(tool, args, words, folder, monkeypatch, capsys):
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    filled = [arg.replace('{tmp}', str(folder)) for arg in args]
    monkeypatch.setattr(sys, 'argv', ['tool', *filled])
    with pytest.raises(SystemExit) as stop:
        run_cli(TOOLS[tool].main)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    (line,) = [x for x in said.splitlines() if x.startswith('error: ')]
    assert words.replace('{tmp}', str(folder)) in line and 'Traceback' not in said
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ('tool', 'args'),
    [
        ('deploy_pruned', [DEMO, 'x.pth', '--out', 'o', '--rounds', '-1']),
        ('prune', [*OWN, '--work-dir', 'w', '--latency-rounds', '-1']),
        ('prune', [DEMO, '--work-dir', 'w', '--epochs', '0']),
        ('ablation', [*ALL, '--batches', '0']),
        ('compare', [DEMO, '--work-dir', 'w', '-j', '0']),
        ('sensitivity', [PRUNE, 'a.pth', '--work-dir', 'w', '--batches', '0']),
        ('ablation', [*ALL, '--batches', 'many']),
    ],
)
def test_numbers_are_checked_as_they_are_read(tool, args, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['tool', *args])
    with pytest.raises(SystemExit):
        run_cli(TOOLS[tool].main)
    assert 'must be a whole number of at least' in capsys.readouterr().err


def test_a_name_that_nothing_reads_is_mentioned(monkeypatch, capsys):
    options = ['modell.depth=3', 'resume=True', 'randomness.seed=1']
    monkeypatch.setattr(sys, 'argv', ['tool', 'no', '--cfg-options', *options])
    args = TOOLS['analyze'].parse_args()
    TOOLS['analyze'].load_config(DEMO, args.cfg_options)
    warning = capsys.readouterr().err
    assert 'adds modell, which' in warning and 'resume' not in warning


@pytest.mark.parametrize('config', [DEMO, PRUNE])
def test_pruned_weights_in_an_unpruned_model(config, folder, monkeypatch, capsys):
    """MMEngine would only warn, and test the rest with random weights."""
    weights = {'state_dict': {'backbone.conv1.weight': torch.ones(3, 3, 7, 7)}}
    torch.save({**weights, 'prune_structure': {}}, folder / 'cut.pth')
    argv = ['test', config, folder / 'cut.pth', '--work-dir', folder / 'work']
    monkeypatch.setattr(sys, 'argv', [*map(str, argv)])
    with pytest.raises(SystemExit):
        run_cli(TOOLS['test'].main)
    said = capsys.readouterr().err
    (line,) = [x for x in said.splitlines() if x.startswith('error: ')]
    assert 'give the config that tools/deploy_pruned.py writes' in line


def test_ctrl_c_ends_a_tool_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == 'interrupted\n'
