"""Stages that run as processes of their own, by a tool that only takes notes."""

import fcntl
import shutil
from contextlib import nullcontext
from pathlib import Path
from threading import Timer

import pytest
import torch
from support.tooling import ROOT

from mmgfp.apps.cli import load_config
from mmgfp.apps.pipeline import Pipeline
from mmgfp.apps.processes import StageError, working_alone
from mmgfp.apps.stages import (
    finetuning_start,
    input_shape,
    original,
    parse_options,
    pruned_checkpoint,
)
from mmgfp.apps.weight_files import digests_of
from mmgfp.utils.errors import ConfigError

DEMO = ROOT / 'configs/demo'


@pytest.fixture
def fake_tools(tmp_path):
    """A tool that appends its arguments to a file, or fails if told to."""
    (tmp_path / 'fake.py').write_text(
        'import sys\n'
        f'with open({str(tmp_path / "calls")!r}, "a") as file:\n'
        '    print(*sys.argv[1:], file=file)\n'
        'print("Epoch(train) [1]"); print("chatter")\n'
        'if "refuse" in sys.argv: print("error: a must be 1 (got 2)"); sys.exit(2)\n'
        'if "die" in sys.argv: sys.exit("error: of a compiler")\n'
        'sys.exit(3 if "fail" in sys.argv else 0)\n'
    )
    return lambda: (tmp_path / 'calls').read_text().splitlines()


def test_finished_stage_is_not_run_again(fake_tools, tmp_path):
    stages = Pipeline(tmp_path, tmp_path / 'w', ['a=1'])
    for _ in range(2):
        stages.run('one', 'fake', 'x', options=['b=2'])
    assert fake_tools() == ['x --cfg-options a=1 b=2']
    assert stages.seconds() == {'one': 0}
    stages.run('one', 'fake', 'y', options=[])  # another command: run
    assert fake_tools()[1:] == ['y --cfg-options a=1']


def test_stage_is_run_again_with_other_weights_of_the_same_name(fake_tools, tmp_path):
    stages, weights = Pipeline(tmp_path, tmp_path / 'w', []), tmp_path / 'a.pth'
    for content in 'xxy':
        weights.write_text(content)
        stages.run('one', 'fake', str(weights), options=['b=2'])
    assert len(fake_tools()) == 2


def test_training_from_other_weights_is_not_resumed(fake_tools, tmp_path, capsys):
    """Begun or finished, in a file of the same name or of another."""
    (tmp_path / 'fake.py').rename(tmp_path / 'train.py')
    for name, content in (('a', 'x'), ('b', 'y'), ('moved', 'x')):
        (tmp_path / name).write_text(content)

    def train(name, words=None, config='net.py', *overrides):
        stages = Pipeline(tmp_path, tmp_path / 'w', overrides)
        with pytest.raises(StageError, match=words) if words else nullcontext():
            stages.train('prune', config, [f'load_from={tmp_path / name}'])

    others = (
        r'with these weights and options \(got .* with others: load_from\); delete it'
    )
    train('b', 'status 0', config='fail')
    train('a', 'status 0', config='fail')  # nothing was there to go on from
    # MMEngine notes here where the last checkpoint is, which may be elsewhere.
    (tmp_path / 'w/prune/last_checkpoint').write_text('/elsewhere/iter_5.pth')
    train('b', others)
    train('a')
    train('a')
    assert f'delete {tmp_path}/w/done/prune.json and {tmp_path}/w/prune)' in (
        capsys.readouterr().out
    )
    train('moved')
    # A finished run would be resumed at its end, whatever is to be different.
    train('a', others.replace('load_from', '--cfg-options'), 'net.py', 'seed=1')
    (tmp_path / 'a').write_text('z')
    train('a', others)
    shutil.rmtree(tmp_path / 'w/prune')
    train('a')
    assert len(fake_tools()) == 5


def test_weights_that_a_config_names_count(fake_tools, tmp_path):
    """As those of a teacher, or of a backbone; not those that are not there."""
    weights = [tmp_path / name for name in ('load.pth', 'teacher.pth')]
    for path in weights:
        path.write_text('1')
    hooks = [dict(type='DistillationHook', checkpoint=str(weights[1]))]
    backbone = dict(init_cfg=dict(checkpoint='torchvision://resnet50.pth'))
    config = tmp_path / 'net.py'
    config.write_text(
        f'custom_hooks = {hooks}\nload_from = {str(weights[0])!r}\n'
        f'model = dict(backbone={backbone})\n'
    )
    before = digests_of(['train', str(config)])
    assert before.keys() == {'load_from', 'custom_hooks.0.checkpoint'}
    other = digests_of(['train', str(config), f'load_from={weights[1]}'])
    assert other == before
    weights[1].write_text('2')
    after = digests_of(['train', str(config)])
    assert [k for k in after if after[k] != before[k]] == ['custom_hooks.0.checkpoint']


def test_failed_stage_stops_and_is_run_again(fake_tools, tmp_path):
    stages = Pipeline(tmp_path, tmp_path / 'w', [])
    for _ in range(2):
        with pytest.raises(StageError, match='one must exit with status 0'):
            stages.run('one', 'fake', 'fail', options=[])
    assert len(fake_tools()) == 2


def test_what_a_tool_refuses_is_said_once(fake_tools, tmp_path, capfd):
    stages = Pipeline(tmp_path, tmp_path / 'w', [])
    with pytest.raises(StageError) as refused:
        stages.run('one', 'fake', 'refuse')
    words = str(refused.value)
    assert words.startswith('one: a must be 1 (got 2) (see ')
    assert str(tmp_path / 'w/logs/one.log') in words and 'a corrected command' in words
    assert 'a must be 1' not in capfd.readouterr().out
    # Not a tool of ours that refuses something.
    with pytest.raises(StageError, match=r'one must exit with status 0 \(got 1: error'):
        stages.run('one', 'fake', 'die')
    assert 'chatter' in capfd.readouterr().out


def test_tools_at_work_are_waited_for_and_it_is_said(tmp_path, capfd):
    with (tmp_path / '.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Timer(0.2, lock.close).start()
        with working_alone(tmp_path):
            assert lock.closed
    said = capfd.readouterr().out
    assert f'still at work in {tmp_path}' in said and 'the newest log' in said


def test_progress_is_shown_and_the_rest_logged(fake_tools, tmp_path, capfd):
    stages = Pipeline(tmp_path, tmp_path, [])
    stages.run('one', 'fake', options=[])
    shown = capfd.readouterr().out
    assert 'Epoch(train) [1]' in shown and 'chatter' not in shown
    assert 'chatter' in (tmp_path / 'logs/one.log').read_text()
    with pytest.raises(StageError):
        stages.run('two', 'fake', 'fail', options=[])
    assert 'chatter' in capfd.readouterr().out  # all that a failure said last


@pytest.mark.parametrize(
    ('entries', 'options'),
    [
        ('', ['load_from=p.pth']),
        ("model = dict(init='scratch')", ['load_from=None']),
        (
            "model = dict(init='original')",
            ['load_from=None', 'model.original=o.pth'],
        ),
        (
            "custom_hooks = [dict(type='EMAHook'), dict(type='DistillationHook')]",
            ['load_from=p.pth', 'custom_hooks.1.checkpoint=o.pth'],
        ),
        (
            "custom_hooks = [dict(type='DistillationHook', teacher='larger.py')]",
            ['load_from=p.pth'],
        ),
    ],
)
def test_finetuning_starts_from_what_its_config_asks_for(tmp_path, entries, options):
    base = DEMO / 'retinanet_r18_fpn_digits_finetune.py'
    config = tmp_path / 'finetune.py'
    config.write_text(f"_base_ = ['{base}']\n{entries}\n")
    cfg = load_config(str(config))
    load_from, structure, *others = finetuning_start(cfg, 'p.pth', 'o.pth')
    assert structure == 'model.structure=p.pth'
    assert [load_from, *others] == options
    assert parse_options(['load_from=None']) == {'load_from': None}


def test_pruned_checkpoint_is_the_last_target_reached(tmp_path):
    with pytest.raises(StageError, match='max_iters'):
        pruned_checkpoint(tmp_path, 'configs/a_prune.py')
    # The files tell: their times may be those of copies.
    for reached, label in (50, 'flops50'), (40, 'flops70'), (60, 'flops40_unfinished'):
        torch.save({'meta': {'iter': reached}}, tmp_path / f'a_prune_{label}.pth')
    found = pruned_checkpoint(tmp_path, 'configs/a_prune.py')
    assert Path(found).name == 'a_prune_flops50.pth'


def test_input_shape_is_the_hooks():
    config = str(DEMO / 'retinanet_r18_fpn_digits_prune.py')
    assert input_shape(config) == (3, 128, 128)
    override = 'custom_hooks.0.input_shape=(3,64,96)'
    assert input_shape(config, [override]) == (3, 64, 96)
    with pytest.raises(ConfigError, match='FisherPruningHook'):
        input_shape(str(DEMO / 'retinanet_r18_fpn_digits.py'))


def test_options_are_parsed_like_the_other_tools_do():
    assert parse_options([]) == {}
    assert parse_options(['a.b=1', 'c=x/y.pth']) == {'a.b': 1, 'c': 'x/y.pth'}


@pytest.mark.parametrize('name', ['my data', 'a,b', '1,(2,3)'])
def test_paths_are_parsed_as_they_are(name, tmp_path):
    path = tmp_path / name
    path.mkdir()
    for text in (path, f'{path}/', f'"{path}"'):
        options = parse_options([f'load_from={text}'])
        assert Path(options['load_from']) == path


def test_weights_that_the_user_has_are_not_trained(tmp_path):
    pipeline = Pipeline(tmp_path, tmp_path, [])
    with pytest.raises(ConfigError, match='--checkpoint must be a checkpoint file'):
        original(pipeline, 'a.py', str(tmp_path / 'none.pth'))
    path = tmp_path / 'some.pth'
    torch.save({'state_dict': {'w': torch.ones(1)}}, path)
    assert original(pipeline, 'a.py', str(path)).checkpoint == str(path)
    assert pipeline.stages == []
