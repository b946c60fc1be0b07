"""One command from a config and a checkpoint to a small model, however often killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support.html import Page
from support.small_configs import config_of
from support.tooling import ROOT, load_tool

from mmgfp.apps.config_text import Entry, config_text, literal
from mmgfp.apps.kept_files import KeptFiles, first_difference
from mmgfp.apps.one_command import check_target
from mmgfp.apps.recipe_configs import RecipeConfigs
from mmgfp.apps.recipe_sources import Sources, check_pruning
from mmgfp.apps.reporting import report_on
from mmgfp.apps.run_config import data_root_options
from mmgfp.apps.training_length import scaled_scheduler
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import ConfigError

KINDS = ['retinanet', 'faster', 'mask', 'classifier']


def net(folder, kind, **entries):
    """A config that knows nothing of pruning: 16 images in batches of 4, 80 epochs."""
    config = config_of(folder, kind)
    config.custom_imports = dict(imports=['mmgfp.demo.digits'])
    config.train_cfg = dict(by_epoch=True, max_epochs=80, val_interval=10)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=40),
        dict(type='MultiStepLR', milestones=[48, 72], gamma=0.1),
    ]
    for name, value in entries.items():
        config[name] = value
    config.dump(folder / 'net.py')
    return config


def written(folder, options=None, epochs=None, checkpoint='net.pth', **pruning):
    """Write both configs for it, and return them as they are read."""
    work = folder / 'work'
    work.mkdir(exist_ok=True)
    pruning = {'target': dict(flops=0.5), 'input_shape': (3, 64, 64), **pruning}
    given = (str(folder / 'net.py'), checkpoint, options or {}, work, pruning, epochs)
    recipe = RecipeConfigs(Sources(*given))
    for path, text, _ in recipe.files():
        path.write_text(text)
        if path != recipe.sources.flat:
            lines = text.splitlines()
            assert all(len(line) <= 88 or folder.name in line for line in lines)
    return [
        Config.fromfile(work / f'net_{stage}.py') for stage in ('prune', 'finetune')
    ]


def prose_of(folder):
    """The text of the config that prunes, without breaks of lines."""
    words = (folder / 'work/net_prune.py').read_text().replace('#', ' ').split()
    return ' '.join(words)


@pytest.mark.parametrize('kind', KINDS)
def test_written_configs_prune_and_fine_tune_by_the_paper(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = net(tmp_path, kind)
    base.model.backbone.update(frozen_stages=1)
    base.dump(tmp_path / 'net.py')
    prune, tune = written(tmp_path)
    # A quarter of 80 epochs of 4 iterations, but at least 20 decisions.
    interval = 25 if kind == 'classifier' else 10
    [hook] = prune.custom_hooks
    assert hook == dict(
        type='FisherPruningHook',
        interval=interval,
        iterations=20 * interval,
        normalize='memory',
        target=dict(flops=0.5),
        input_shape=(3, 64, 64),
    )
    check_pruning({k: v for k, v in hook.items() if k != 'type'})
    assert prune.load_from == str(tmp_path / 'net.pth')
    assert prune.model.backbone.frozen_stages == -1
    assert prune.train_cfg == dict(
        type='IterBasedTrainLoop', max_iters=32 * interval, val_interval=32 * interval
    )
    assert prune.train_dataloader.sampler.type == 'InfiniteSampler'
    assert prune.train_dataloader.batch_size == 4
    rate = base.optim_wrapper.optimizer.lr
    assert prune.optim_wrapper.optimizer.lr == pytest.approx(rate / 10)
    assert prune.optim_wrapper.optimizer.type == base.optim_wrapper.optimizer.type
    assert prune.param_scheduler == [] and prune.val_cfg is prune.val_dataloader is None
    checkpoint = prune.default_hooks.checkpoint
    assert checkpoint.interval == interval and not checkpoint.by_epoch

    assert tune.model.type == 'PrunedModel'
    assert tune.model.architecture == Config.fromfile(tmp_path / 'net.py').model
    assert tune.model.backbone == dict(frozen_stages=-1, init_cfg=None)
    artifact = str(tmp_path / 'work/prune/net_prune_flops50.pth')
    assert tune.model.structure == tune.load_from == artifact
    for name in ('train_cfg', 'param_scheduler', 'optim_wrapper', 'val_dataloader'):
        assert tune[name] == base[name]
    assert [h.type for h in tune.custom_hooks] == ['ExactResumeHook']
    assert {'mmgfp', 'mmgfp.demo.digits'} == {*tune.custom_imports.imports}


def test_an_iteration_based_config(tmp_path):
    net(
        tmp_path,
        'classifier',
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=4030, val_interval=500),
        param_scheduler=[dict(type='CosineAnnealingLR', T_max=4030, by_epoch=False)],
        custom_hooks=[dict(type='EMAHook')],
    )
    prune, tune = written(tmp_path, checkpoint=None)
    assert '(25% of fine-tuning)' in prose_of(tmp_path)
    ema, hook = prune.custom_hooks
    assert ema == dict(type='EMAHook')
    assert hook.iterations == 1000  # a quarter, in whole intervals of 25
    assert prune.train_cfg.max_iters == 1000 + 100 + 250
    assert prune.default_hooks.checkpoint.interval == 50
    assert tune.train_cfg.max_iters == 4030
    # Where the weights of a model that is trained first will be.
    assert prune.load_from == str(tmp_path / 'work/baseline/iter_4030.pth')
    # 90 epochs of 4 iterations.
    prune, tune = written(tmp_path, epochs=90)
    assert '(20 decisions, as fine-tuning is short)' in prose_of(tmp_path)
    assert prune.custom_hooks[1].iterations == 500
    assert tune.train_cfg.max_iters == tune.train_cfg.val_interval == 360
    assert tune.param_scheduler[0].T_max == 360


@pytest.mark.parametrize('interval', [{}, {'interval': 10}, {'interval': 1}])
def test_fine_tuning_can_go_on_from_each_epoch(interval, tmp_path):
    """A hook without an interval would save at the end alone."""
    hooks = dict(checkpoint=dict(type='CheckpointHook', **interval))
    net(tmp_path, 'classifier', default_hooks=hooks)
    _, tune = written(tmp_path)
    assert tune.default_hooks.checkpoint.interval == 1


def test_epochs_and_options_of_the_command_line(tmp_path):
    net(tmp_path, 'faster')
    options = {
        'train_dataloader.batch_size': 2,
        'model.backbone.depth': 34,
        'train_dataloader.num_workers': 0,
        'randomness.seed': 7,
    }
    prune, tune = written(tmp_path, options, 40, divisor=4, criterion='l1')
    for config in (prune, tune):
        assert config.randomness.seed == 7 and config.train_dataloader.batch_size == 2
        assert config.model.backbone.depth == 34
    assert build_model(prune).backbone.depth == 34
    assert tune.model.architecture.backbone.depth == 18  # below the override
    assert prune.train_dataloader.sampler.type == 'InfiniteSampler'
    assert prune.custom_hooks[0].type == 'ChannelPruningHook'
    assert prune.custom_hooks[0].divisor == 4
    assert tune.train_cfg.max_epochs == 40 and tune.train_cfg.val_interval == 10
    warmup, steps = tune.param_scheduler
    assert (warmup.begin, warmup.end) == (0, 20) and steps.milestones == [24, 36]


def test_a_config_that_imports_what_it_names(tmp_path):
    """MMEngine lets no config in plain text inherit it, so a copy in text does."""
    net(tmp_path, 'classifier', custom_hooks=[dict(type='EMAHook')])
    (tmp_path / 'net.py').rename(tmp_path / 'old.py')
    (tmp_path / 'net.py').write_text(
        'from mmengine.config import read_base\n'
        'from mmengine.dataset import DefaultSampler\n'
        'from mmengine.hooks import EMAHook\n'
        'from torch.optim import SGD\n\n'
        'with read_base():\n    from .old import *\n\n'
        'optim_wrapper.update(optimizer=dict(type=SGD, lr=0.5))\n'
        'train_dataloader.update(sampler=dict(type=DefaultSampler, shuffle=False))\n'
        'custom_hooks = [dict(type=EMAHook)]\n'
    )
    prune, tune = written(tmp_path)
    assert prune.optim_wrapper.optimizer.lr == 0.05
    assert prune.optim_wrapper.optimizer.type == 'torch.optim.SGD'
    sampler = prune.train_dataloader.sampler
    assert sampler == dict(type='InfiniteSampler', shuffle=False)
    assert prune.custom_hooks[0].type.endswith('EMAHook')
    assert tune.model.architecture.type == 'ImageClassifier'


def test_what_is_left_to_the_user_is_said(tmp_path):
    switch = dict(type='PipelineSwitchHook', switch_epoch=70)
    config = net(tmp_path, 'classifier', custom_hooks=[switch])
    given = (str(tmp_path / 'net.py'), 'net.pth', {}, tmp_path / 'work')
    pruning = dict(target=dict(flops=0.5))
    assert RecipeConfigs(Sources(*given, pruning)).notes == []
    [note] = RecipeConfigs(Sources(*given, pruning, 8)).notes
    assert 'net_finetune.py: PipelineSwitchHook (switch_epoch) as for' in note
    del config.optim_wrapper.optimizer['lr']
    config.dump(tmp_path / 'net.py')
    recipe = RecipeConfigs(Sources(*given, pruning))
    [note] = recipe.notes
    assert 'net_prune.py: no optim_wrapper.optimizer.lr' in note
    assert 'optim_wrapper' not in recipe.files()[0][1]


@pytest.mark.parametrize('hooks', [dict(type='EMAHook'), ['EMAHook']])
def test_hooks_that_are_no_dicts_are_refused(hooks, tmp_path):
    net(tmp_path, 'classifier', custom_hooks=hooks)
    with pytest.raises(ConfigError, match='custom_hooks must be a list of dicts with'):
        written(tmp_path)


@pytest.mark.parametrize(
    'entry', [dict(optim_wrapper=1), dict(custom_imports=3), dict(train_cfg='a')]
)
def test_entries_of_wrong_types_are_refused_in_one_line(entry, tmp_path, monkeypatch):
    net(tmp_path, 'classifier')
    ((name, value),) = entry.items()
    text = (tmp_path / 'net.py').read_text()
    (tmp_path / 'net.py').write_text(f'{text}\n{name} = {value!r}\n')
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'net.pth')
    words = f'prune {tmp_path}/net.py {tmp_path}/net.pth --target flops=0.5'
    argv = [*words.split(), '--work-dir', str(tmp_path / 'work')]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(ConfigError, match='must be a config'):
        load_tool('prune').main()
    assert not (tmp_path / 'work/net_prune.py').exists()


def test_what_was_pruned_already_is_refused(tmp_path):
    net(tmp_path, 'classifier', custom_hooks=[dict(type='ChannelPruningHook')])
    with pytest.raises(ConfigError, match='CONFIG must be the one that trained'):
        written(tmp_path)


@pytest.mark.parametrize(
    ('scheduler', 'factor', 'expected'),
    [
        (dict(T_max=3, end=3), 0.1, dict(T_max=1, end=0, begin=0)),
        (dict(begin=5, end=100), 0.2, dict(begin=1, end=20)),
        (dict(milestones=[16, 22], end=None), 0.5, dict(milestones=[8, 11], end=None)),
    ],
)
def test_schedulers_are_scaled(scheduler, factor, expected):
    assert {'begin': 0, **expected} == scaled_scheduler(scheduler, factor)


def test_a_work_dir_on_another_disk(tmp_path):
    """A link to a folder elsewhere: '..' leads to what is above that one."""
    net(tmp_path, 'classifier')
    (tmp_path / 'disk/a/b').mkdir(parents=True)
    (tmp_path / 'work').symlink_to(tmp_path / 'disk/a/b')
    prune, _ = written(tmp_path)
    assert prune.model == Config.fromfile(tmp_path / 'net.py').model


def test_text_of_configs_is_python(tmp_path):
    value = dict(
        {'lambda': 0.5},
        type='Resize',
        scale=[(1333, 640), (1333, 800)],
        nested=dict(text="it's", none=None, one=(1,), empty=[], numbers={0: 1.5}),
        long=['a' * 30, 'b' * 30, 'c' * 30],
    )
    assert eval(literal(value, width=40)) == value == eval(literal(value, width=10**4))
    text = config_text(
        'T ' * 60, 'mmdet::a.py', [Entry('a', value), Entry('b', '{{a}}')]
    )
    scope = {}
    exec(text, scope)
    assert scope['a'] == scope['b'] == value and scope['_base_'] == 'mmdet::a.py'
    assert max(map(len, text.splitlines())) <= 88


def test_edited_files_are_kept_and_used_ones_not_replaced(tmp_path):
    path, files = tmp_path / 'a.py', KeptFiles(tmp_path / 'notes.json')

    def write(text, used=False):
        return files.write(path, text, used, 'name another folder')

    assert write('a = 1') == f'{path}: written' and write('a = 1', used=True) == ''
    assert write('a = 2') == f'{path}: written anew' and path.read_text() == 'a = 2'
    # What another version has put in other words is no reason to begin anew.
    assert write('# Two.\na = 2', used=True) == '' and path.read_text() == 'a = 2'
    with pytest.raises(ConfigError, match=r'got a=2 instead of 3\).*another folder'):
        write('a = 3', used=True)
    assert [p.name for p in tmp_path.glob('*.py')] == ['a.py']
    path.write_text('a = 9')
    for used in (False, True):
        assert 'kept as you edited it' in write('a = 2', used)
    assert path.read_text() == 'a = 9'
    path.unlink()
    assert write('a = 3') == f'{path}: written'


def test_the_first_entry_that_differs_is_named():
    old = dict(a=dict(b=[1, dict(c=2)]), d=3)
    assert first_difference(old, old) == ''
    new = dict(a=dict(b=[1, dict(c=4)]), d=3)
    assert first_difference(old, new) == 'a.b.1.c=2 instead of 4'
    assert first_difference(old, dict(old, e=5)) == 'e=None instead of 5'
    assert first_difference(old, dict(a=1, d=3)).startswith('a={')
    assert first_difference([1], [1, 2], 'x') == 'x=[1] instead of [1, 2]'


def test_the_target_is_that_of_an_edited_config(tmp_path):
    path = tmp_path / 'net_prune.py'
    hook = dict(type='FisherPruningHook', target=[dict(flops=0.7), dict(flops=0.5)])
    path.write_text(f'custom_hooks = [{hook}]')
    check_target(path, [dict(macs=0.7), dict(flops=0.5)])
    words = r'--target must be flops=0.7 flops=0.5, as you .*\(got flops=0.4\)'
    with pytest.raises(ConfigError, match=words):
        check_target(path, dict(flops=0.4))
    path.write_text('')
    check_target(path, dict(flops=0.4))  # what lacks, the run says


def test_data_root_is_a_variable_or_each_dataset_s(tmp_path):
    folder, data = str(tmp_path), dict(dataset=dict(data_root='data/x'))
    for old, slash in (('a/', '/'), ('a', '')):
        options = data_root_options(Config(dict(data_root=old)), folder)
        assert options == [f'data_root={folder}{slash}']
    loaders = dict(train_dataloader=data, val_dataloader=data, test_dataloader=None)
    assert data_root_options(Config(loaders), folder) == [
        f'{split}_dataloader.dataset.data_root={folder}' for split in ('train', 'val')
    ]
    wrapped = dict(train_dataloader=dict(dataset=dict(dataset=data['dataset'])))
    with pytest.raises(ConfigError, match='--data-root must be given with a config'):
        data_root_options(Config(wrapped), folder)


def test_neither_pictures_nor_the_report_fail_a_command(tmp_path, capsys):
    """What the report is about is there, whatever becomes of the report."""

    def fail():
        raise RuntimeError('no\nimage')

    assert report_on(tmp_path, fail) == []
    _, pictures, page = capsys.readouterr().out.splitlines()
    assert pictures == 'the report shows no detections: RuntimeError: no image'
    assert page.startswith('no report: WORK_DIR must be the folder of a run (got')
    row = dict(model='original', macs=100, memory=10, params=1)
    rows = {'rows': [row, row | dict(model='pruned', macs=50)], 'metric': None}
    (tmp_path / 'summary.json').write_text(json.dumps(rows))
    assert report_on(tmp_path, fail) == ['report.html']
    assert len(capsys.readouterr().out.splitlines()) == 2
    _, rows = Page((tmp_path / 'report.html').read_text()).table('measured')
    assert len(rows) == 2


def start(folder, kind):
    """A command on a config that trains for some seconds, and random weights."""
    steps = [dict(type='MultiStepLR', milestones=[1], gamma=0.1)]
    epochs = 40 if kind == 'classifier' else 3
    train = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
    net(folder, kind, param_scheduler=steps, train_cfg=train)
    torch.manual_seed(0)
    model = build_model(Config.fromfile(folder / 'net.py'))
    torch.save({'state_dict': model.state_dict()}, folder / 'net.pth')
    words = 'net.py net.pth --work-dir work --target flops=0.7 --divisor 1'
    words += ' --input-shape 3 64 64 --latency-rounds 1 --export onnx'
    return [str(ROOT / 'tools/prune.py'), *words.split()]


def begin(folder, command):
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def killed_once_there_is(pattern, folder, command):
    """Start a command, and kill all its processes once a file is there."""
    process = begin(folder, command)
    end = time.monotonic() + 600
    while not any(folder.glob(pattern)) and time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def finished(folder, command, status=0):
    process = begin(folder, command)
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == status, said[-3000:]
    return said


@pytest.mark.slow
def test_dry_run_writes_configs_and_shows_what_can_be_pruned(tmp_path):
    command = [*start(tmp_path, 'classifier'), '--dry-run']
    said = finished(tmp_path, command)
    assert 'Coupled channels' in said and 'of output channels' in said
    assert said.endswith('the same command without --dry-run does it\n')
    files = {p.name for p in (tmp_path / 'work').iterdir()}
    assert files == {'net_prune.py', 'net_finetune.py', 'done', '.lock'}
    command[command.index('flops=0.7')] = 'flops=0.6'
    said = finished(tmp_path, command)
    assert 'net_prune.py: written anew' in said
    assert Config.fromfile(tmp_path / 'work/net_prune.py').custom_hooks[0].target == {
        'flops': 0.6
    }


@pytest.mark.slow
def test_a_refused_target_can_be_asked_for_otherwise(tmp_path):
    """In the same folder, as nothing was pruned; the dry run has told before."""
    command = start(tmp_path, 'retinanet')
    command[command.index('--divisor') + 1] = '64'
    said = ' '.join(finished(tmp_path, [*command, '--dry-run'], 2).split())
    refusal = 'target.flops must be at least'
    assert f'pruning would be refused: {refusal}' in said
    assert 'the same command without --dry-run' not in said
    said = finished(tmp_path, command, 2)
    assert said.count(refusal) == 1 and 'must exit with status' not in said
    assert f'error: prune: {refusal}' in said and 'divisor=1 leaves' in said
    command[command.index('--divisor') + 1] = '4'
    said = finished(tmp_path, command)
    assert 'net_prune.py: written anew' in said
    assert (tmp_path / 'work/report.html').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_killed_in_each_stage_it_goes_on_to_the_end(kind, tmp_path):
    command, work = start(tmp_path, kind), tmp_path / 'work'
    for file in ('prune/last_checkpoint', 'finetune/last_checkpoint', 'deploy/*'):
        status = killed_once_there_is(f'work/{file}', tmp_path, command)
        assert status == -signal.SIGKILL
    said = finished(tmp_path, command)
    assert 'prune: finished before' in said and 'finetune: finished before' in said
    resumed = (work / 'logs/prune.log').read_text().split('resumed epoch: 0, iter: ')
    assert len(resumed) == 2 and int(resumed[1].split()[0]) > 0
    assert 'resumed epoch: ' in (work / 'logs/finetune.log').read_text()

    baseline, pruned, tuned = json.loads((work / 'results.json').read_text())['rows']
    for cost in ('macs', 'memory', 'params'):
        assert pruned[cost] == tuned[cost] < baseline[cost]
    assert pruned['macs'] <= 0.7 * baseline['macs']
    assert all(row['metrics'] for row in (baseline, pruned, tuned))
    names = {path.name for path in (work / 'deploy').iterdir()}
    suffixes = ('.py', '.pth', '.onnx')
    assert {f'net_finetune{s}' for s in suffixes} | {'structure.json'} <= names
    assert (work / 'channels.png').stat().st_size > 0
    page = Page((work / 'report.html').read_text())
    assert len(page.tables['measured']) == 1
    if kind == 'classifier':
        assert 'detections' not in said and 'Detections' not in page.text
    else:
        header, rows = page.table('detections')
        assert header == ['image', 'baseline', 'pruned', 'fine-tuned']
        assert len(rows) == 3

    # Another target is not taken for the same run.
    command[command.index('flops=0.7')] = 'flops=0.5'
    said = finished(tmp_path, command, 2)
    assert 'net_prune.py must be what this command writes' in said
    assert 'target.flops=0.7 instead of 0.5' in said
    assert Path(work / 'prune/net_prune_flops70.pth').is_file()
