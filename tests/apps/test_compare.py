"""Comparisons: their settings, statistics, failures, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch
from support.latency import made_up
from support.latency import write as write_profile
from support.small_configs import stages
from support.tooling import ROOT

from mmgfp.apps.cli import load_config
from mmgfp.apps.compare import latency
from mmgfp.apps.compare.report import settings_notes
from mmgfp.apps.compare.results import comparison_cells, curves_of, summarize
from mmgfp.apps.compare.runs import run_all
from mmgfp.apps.compare.settings import Comparison, read_comparison
from mmgfp.apps.compare.variants import Variant
from mmgfp.apps.plots import plot_curves, plot_losses
from mmgfp.apps.processes import Processes, StageError
from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.errors import ConfigError

DEMO = [
    str(ROOT / f'configs/demo/retinanet_r18_fpn_digits{stage}.py')
    for stage in ('', '_prune', '_finetune')
]
NAMES = ('baseline', 'prune', 'finetune')
FILES = dict(
    baseline_config='b.py', baseline_checkpoint='b.pth', pruned_checkpoint='p.pth'
)


def comparison_of(*variants, **fields):
    configs = dict(zip(NAMES, DEMO, strict=True))
    variants = tuple(Variant(**v) for v in variants or [dict(name='M')])
    return Comparison(**configs, variants=variants, **fields)


def hook_of(config):
    (hook,) = config.custom_hooks
    return hook


# --- settings


def test_runs_are_variants_times_targets_times_seeds():
    comparison = comparison_of(
        dict(name='a b', pruning=dict(normalize='none')),
        dict(name='c', targets=[dict(memory=0.5)]),
        dict(name='narrow', train={}),
        targets=[dict(flops=0.5), [dict(flops=0.7), dict(flops=0.25)]],
        seeds=[0, 7],
    )
    runs = comparison.runs
    assert [str(run.folder) for run in runs[:4]] == [
        'a_b/flops50/seed0',
        'a_b/flops70_flops25/seed0',
        'c/memory50/seed0',
        'narrow/unpruned/seed0',
    ]
    assert [run.name for run in runs[4:]] == [
        'a b, flops=0.5, seed 7',
        'a b, flops=0.7, then flops=0.25, seed 7',
        'c, memory=0.5, seed 7',
        'narrow, seed 7',
    ]


def test_targets_and_seeds_are_the_configs_unless_told():
    (run,) = comparison_of().runs
    assert (run.name, str(run.folder)) == ('M, flops=0.5', 'M/flops50/seed')
    config = comparison_of().prune_config(run, FILES)
    assert config.randomness.seed == 0 and config.load_from == 'b.pth'


def test_settings_reach_the_hook_of_the_config():
    criterion = dict(type='random', seed='{seed}')
    pruning = dict(iterations=900, units_per_step=None, criterion=criterion)
    variant = dict(name='x', pruning=pruning, prune=dict(max_iters=5))
    comparison = comparison_of(variant, targets=[dict(memory=0.7)], seeds=[3])
    config = comparison.prune_config(comparison.runs[0], FILES)
    hook = hook_of(config)
    assert hook.type == 'ChannelPruningHook'  # since a criterion is named
    assert hook.criterion == dict(type='random', seed=3)
    assert hook.target == dict(memory=0.7) and hook.iterations == 900
    assert 'units_per_step' not in hook and hook.interval == 10
    assert config.randomness.seed == 3 and config.max_iters == 5


def test_dotted_settings_change_what_is_there():
    variant = dict(name='x', pruning={'schedule.iterations': 7})
    comparison = comparison_of(variant)
    base = load_config(DEMO[1])
    base.custom_hooks[0].schedule = dict(type='cubic', iterations=5)
    comparison = comparison_of(
        variant,
        options={'custom_hooks.0.schedule': dict(type='cubic', iterations=5)},
    )
    hook = hook_of(comparison.prune_config(comparison.runs[0], FILES))
    assert hook.schedule == dict(type='cubic', iterations=7)


def test_fine_tuning_gets_its_files_and_overrides():
    teacher = dict(config='{baseline_config}', weights='at {baseline_checkpoint}')
    hooks = [dict(type='Other', teacher=teacher), dict(type='DistillationHook')]
    finetune = {'model.init': 'original', 'custom_hooks': hooks}
    comparison = comparison_of(dict(name='x', finetune=finetune), seeds=[3])
    config = comparison.finetune_config(comparison.runs[0], FILES)
    assert config.model.structure == 'p.pth' and config.load_from is None
    assert config.model.original == 'b.pth' and config.randomness.seed == 3
    assert config.custom_hooks[1].checkpoint == 'b.pth'
    teacher = config.custom_hooks[0].teacher
    assert teacher == dict(config='b.py', weights='at b.pth')
    # What is killed ends as if it had not been.
    assert config.custom_hooks[2:] == [dict(type='ExactResumeHook')]
    (run,) = comparison_of().runs
    config = comparison_of().finetune_config(run, FILES)
    assert config.model.structure == config.load_from == 'p.pth'


def test_unpruned_variants_are_trained_from_scratch():
    train = {'model.backbone.base_channels': 24}
    comparison = comparison_of(dict(name='narrow', train=train), seeds=[4])
    config = comparison.train_config(comparison.runs[0], FILES)
    assert config.model.backbone.base_channels == 24
    assert config.load_from is None and config.randomness.seed == 4
    assert config.custom_hooks == [dict(type='ExactResumeHook')]
    hooks = [dict(type='ExactResumeHook', agree_interval=5)]
    comparison = comparison_of(dict(name='x', train=dict(custom_hooks=hooks)))
    config = comparison.train_config(comparison.runs[0], FILES)
    assert config.custom_hooks == hooks


HEAD = 'baseline, prune, finetune = {}\n'.format(', '.join(map(repr, DEMO)))


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('seed = [0]', r"seed must be one of its options.*did you mean 'seeds'"),
        ("variants = [dict(name='a', prunning={})]", "did you mean 'pruning'"),
        ('variants = [dict(pruning={})]', 'a dict with a name'),
        ('variants = []', 'none for variants'),
        ("variants = [dict(name='a b'), dict(name='a_b')]", 'of their own'),
        ("variants = [dict(name='a', train={}, pruning=dict(a=1))]", 'got both'),
        ("variants = [dict(name='a', pruning=3)]", 'pruning must be a dict'),
        ('targets = [dict(flops=2)]', 'target.flops must be a ratio'),
        ('targets = [dict(flops=0.5), dict(flops=0.5)]', 'different ones for each run'),
        ('seeds = []', 'seeds must be a list of at least one'),
        ('seeds = [0, -1]', r'seeds must be whole numbers.*got -1'),
        ('seeds = [1, True]', r'seeds must be whole numbers.*got True'),
        ('seeds = [0, None]', r'seeds must be whole numbers.*got None'),
        ('batches = 4', 'batches must be a list'),
        ('latency_rounds = -1', 'latency_rounds must be a count'),
        ("also = dict(hard='a=1')", 'also: hard must be a list'),
        ('options = None', 'options must be a dict'),
        ("checkpoint = 'none.pth'", 'checkpoint must be a checkpoint file'),
        ("variants = dict(name='M')", 'variants must be a list of dicts'),
        ("variants = ['name']", r'variants\[0\] must be a dict with a name'),
        ("variants = [dict(name='baseline')]", "not 'baseline'"),
        ("variants = [dict(name='a|b')]", r'in one line without \|'),
        ("variants = [dict(name='a', train=[1])]", 'train must be a dict by names'),
        ("variants = [dict(name='a', pruning={1: 2})]", 'pruning must be a dict by'),
        (
            "variants = [dict(name='a', targets=[])]",
            'targets must be a list of at least',
        ),
        (
            "variants = [dict(name='a'), dict(name='a, flops=0.5', train={})]",
            'different ones for each run',
        ),
        (
            "variants = [dict(name='a', pruning=dict(target=dict(flops=0.3)))]",
            "name it in the comparison's or the variant's targets",
        ),
        (
            "variants = [dict(name='a', prune={'custom_hooks.0.target.flops': 0.3})]",
            "name it in the comparison's or the variant's targets",
        ),
        (
            "variants = [dict(name='a', finetune={'randomness.seed': 7})]; seeds = [1]",
            'use seeds',
        ),
        (
            "variants = [dict(name='a', finetune={'model.init': 'orginal'})]",
            'finetune: model.init must be one of',
        ),
        ("variants = [dict(name='a', pruning=dict(intervall=3))]", "variant 'a'.*did"),
        ("variants = [dict(name='a', pruning=dict(interval=0))]", "variant 'a'.*inter"),
        ("variants = [dict(name='a', prune={'custom_hooks.3.x': 1})]", 'in lists'),
        ("prune = 'none.py'", 'got none.py'),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, text, words):
    path = tmp_path / 'compare.py'
    path.write_text(f"{HEAD}variants = [dict(name='M')]\n{text}\n")
    with pytest.raises(ConfigError, match=words):
        read_comparison(str(path)).check_configs()


#: Latency profiles that comparisons name, and the size of their image.
PROFILED = {
    'resnet20': [3, 32, 32],
    'retinanet_bccd': [3, 256, 320],
    'bccd': [3, 256, 320],
}


@pytest.mark.parametrize('path', sorted((ROOT / 'configs/compare').glob('*.py')))
def test_comparisons_we_ship_can_be_run(path, monkeypatch, tmp_path):
    """Latency profiles that they name are measured first; made-up ones stand in."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    layer = {'conv.weight': (8, 3, 3, 3)}, {'conv.weight': LayerProfile(1, 1)}
    for name, size in PROFILED.items():
        profile = made_up(*layer, origin=dict(input_shape=size))
        write_profile(profile, tmp_path / f'{name}.json')
    monkeypatch.chdir(tmp_path)
    comparison = read_comparison(str(path), ['data_root=elsewhere/'])
    comparison.check_configs()
    assert len(comparison.seeds) == 3
    run = comparison.runs[0]
    is_pruned = run.variant.is_pruned
    build = comparison.prune_config if is_pruned else comparison.train_config
    config = build(run, FILES)
    assert config.train_dataloader.dataset.data_root == 'elsewhere/'


# --- statistics


def result(variant, seed, top1, macs, target='flops=0.5', **more):
    costs = dict(macs=macs, memory=macs / 10, params=macs / 100)
    run = f'{variant} {seed}'
    facts = dict(variant=variant, seed=seed, target=target, run=run, costs=costs)
    return facts | dict(metrics={'accuracy/top1': top1}, **more)


RESULTS = [
    result('baseline', None, 95.0, 4e9, target=''),
    *(result('M', s, x, m) for s, x, m in [(0, 90.0, 2e9), (1, 92, 1e9), (2, 94, 3e9)]),
    result('U', 0, 80.0, 2e9),
]
TIMES = {'latency_ms': {'1': {'baseline None': 8.0, 'M 0': 4, 'M 1': 5, 'M 2': 6}}}


def test_means_and_spreads_by_hand():
    baseline, m, u = summarize(RESULTS, times=TIMES)
    # deviations of -2, 0 and 2: a sum of squares of 8, over n - 1 = 2
    assert m['metric'] == dict(name='top-1', mean=92, std=2, values=[90, 92, 94])
    assert u['metric']['std'] is None
    assert m['seeds'] == [0, 1, 2] and m['macs'] == 2e9
    assert m['latency_ms'] == {'1': 5} and 'latency_ms' not in u
    planned = {('M', 'flops=0.5'): 3, ('U', 'flops=0.5'): 3, ('I', 'flops=0.5'): 3}
    cells = comparison_cells([baseline, m, u], planned)
    assert cells[0] == [
        *('model', 'top-1', 'MACs (G)', 'memory (M)', 'params (M)'),
        *('CPU, PyTorch (ms)', 'runs'),
    ]
    sizes = ['2.000 (50%)', '200.0 (50%)', '20.00 (50%)']
    assert cells[2] == ['M', '92.00 ± 2.00', *sizes, '5.0 (62%)', '3 of 3']
    assert cells[3] == ['U', '80.00', *sizes, '', '1 of 3']
    assert cells[4] == ['I', *[''] * 5, '0 of 3, failed']


def test_one_run_each_needs_no_column_of_runs_but_several_targets_one():
    rows = summarize([RESULTS[0], RESULTS[1], result('M', 0, 70.0, 1e9, 'flops=0.25')])
    planned = {('M', 'flops=0.5'): 1, ('M', 'flops=0.25'): 1}
    header, _, first, second = comparison_cells(rows, planned)
    assert header[:3] == ['model', 'target', 'top-1'] and 'runs' not in header
    assert first[:3] == ['M', 'flops=0.5', '90.00']
    assert second[:3] == ['M', 'flops=0.25', '70.00']


def test_what_all_pruned_variants_share_is_said_once():
    tuned = {'train_cfg.max_epochs': 2}
    variants = [
        Variant('M', dict(interval=5), finetune=tuned),
        Variant('L', dict(interval=5, normalize='latency'), finetune=tuned),
        Variant('on', train={'load_from': 'b.pth'}),
    ]
    assert settings_notes(variants) == [
        'all that are pruned: `interval=5, finetune: train_cfg.max_epochs=2`',
        'M: nothing else',
        'L: `normalize=latency`',
        'on: `train: load_from=b.pth`',
    ]
    assert settings_notes(variants[:1]) == [
        'M: `interval=5, finetune: train_cfg.max_epochs=2`'
    ]
    assert settings_notes([Variant('M')]) == ['M: as configured']


def test_further_tests_and_other_metrics_have_columns():
    also = dict(also={'hard': {'accuracy/top1': 50.0, 'f1': 2.5}})
    runs = [result('baseline', None, 95.0, 4e9, '', **also)]
    assert comparison_cells(summarize(runs), {})[0][1:3] == ['top-1', 'top-1, hard']
    runs[0]['metrics']['f1'] = 3.5
    cells = comparison_cells(summarize(runs, 'f1'), {})
    assert cells[0][1:3] == ['f1', 'f1, hard'] and cells[1][1:3] == ['3.50', '2.50']
    with pytest.raises(ConfigError, match='metric must be one of accuracy/top1, f1'):
        summarize(runs, 'recall')


def test_curves_are_shares_of_the_baseline(tmp_path):
    more = result('M', 3, 70.0, 1e9, 'flops=0.25')
    curves = curves_of(summarize([*RESULTS, more], times=TIMES))
    assert curves['MACs'] == {
        'baseline': [(100, 95, 0)],
        'M': [(25, 70, 0), (50, 92, 2)],
        'U': [(50, 80, 0)],
    }
    assert curves['time in PyTorch']['M'] == [(62.5, 92, 2)]
    for name in ('curves', 'losses'):
        path = tmp_path / f'{name}.png'
        if name == 'curves':
            plot_curves(curves, 'top-1', path)
        else:
            plot_losses([[0.1, None], [2, 3]], ['a', 'b'], [0.25, 0.5], 'mAP', path)
        image = cv2.imread(str(path))
        assert image.shape[1] > image.shape[0] > 200 and image.std() > 5


def test_times_are_the_baselines_times_the_ratios_in_its_rounds(tmp_path, monkeypatch):
    asked = []

    def measured(sources, size, rounds):
        asked.append((tuple(sources), size, rounds))
        rows = [
            dict(model=source, runtime=runtime, batch=size[0], wall_ms=dict(median=ms))
            | dict(wall_ratio=dict(median=ratio))
            for runtime, ms in [('torch', 10.0), ('onnxruntime', 4.0)]
            for source, ms, ratio in [('b.py:b', ms, 1.0), ('m.py:m', 99.0, 0.5)]
        ]
        return rows[:3] if size[0] == 2 else rows, [f'note {size[0]}']

    monkeypatch.setattr(latency, '_measure_batch', measured)
    models = {'baseline': 'b.py:b', 'M': 'm.py:m'}
    path = tmp_path / 'latency.json'
    report = latency.measure_all(models, (3, 8, 8), [1, 2], 5, path)
    assert report['times'] == {
        'latency_ms': {
            '1': {'baseline': 10.0, 'M': 5.0},
            '2': {'baseline': 10.0, 'M': 5.0},
        },
        'onnxruntime_ms': {'1': {'baseline': 4.0, 'M': 2.0}, '2': {'baseline': 4.0}},
    }
    assert report['notes'] == ['note 1', 'note 2']
    # The same models are not timed again, others are.
    assert latency.measure_all(models, (3, 8, 8), [1, 2], 5, path) == report
    assert [size for _, size, _ in asked] == [(1, 3, 8, 8), (2, 3, 8, 8)]
    latency.measure_all(models, (3, 8, 8), [1], 5, path)
    assert len(asked) == 3
    nothing = latency.measure_all(models, (3, 8, 8), [1], 0, path)
    assert nothing['times'] == {} and len(asked) == 3


# --- runs


def test_a_failure_has_its_reason_and_stops_no_other(capsys):
    runs = comparison_of(targets=[dict(flops=x) for x in (0.5, 0.6, 0.7, 0.8)]).runs

    def execute(run):
        if run is runs[0]:
            raise OSError('disk full')
        if run is runs[1]:
            raise StageError('no room')
        return {'of': run.name}

    def describe(result):
        if result['of'] == runs[3].name:
            raise ConfigError('metric', "the baseline's", 'another', 'name it')
        return 'well'

    found, failures = run_all(runs, execute, 2, Processes(), describe)
    assert found == [{'of': runs[2].name}]
    assert failures == {
        runs[0].name: 'OSError: disk full',
        runs[1].name: 'no room',
        runs[3].name: "metric must be the baseline's (got another); name it",
    }
    assert f'{runs[2].name}: well' in capsys.readouterr().out


# --- the tool

COMPARISON = """
baseline, prune, finetune = {configs}
variants = [
    dict(name='M', pruning=dict(normalize='memory')),
    dict(name='U', pruning=dict(normalize='none')),
    dict(name='same', train={{}}),
    dict(name='slow', prune={{'train_cfg.max_iters': 1}}),
]
targets = [dict(flops=0.8)]
seeds = [0]
latency_rounds = 1
"""


def start(folder, work, *flags):
    tool = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/compare.py')]
    command = [*tool, 'compare.py', '--work-dir', str(work), *flags]
    log = (folder / 'log.txt').open('a')
    # With -j each tool has one thread; sums over two would differ in the last bit.
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True
    )


def wait_for(path, process, seconds=400):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, path
        time.sleep(0.05)


def table_of(work):
    results = json.loads((work / 'results.json').read_text())
    rows = [
        {k: v for k, v in row.items() if not k.startswith(('latency', 'onnxruntime'))}
        for row in results['rows']
    ]
    return rows, results['failures']


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('kind', ['classifier', 'retinanet'])
def test_a_comparison_that_is_killed_twice_ends_in_the_same_table(kind, tmp_path):
    configs = [str(path) for path in stages(tmp_path, kind)]
    (tmp_path / 'compare.py').write_text(COMPARISON.format(configs=configs))
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    assert start(tmp_path, whole).wait(900) == 1  # as one variant fails
    rows, failures = table_of(whole)
    assert [row['model'] for row in rows] == ['baseline', 'M', 'U', 'same']
    assert list(failures) == ['slow, flops=0.8, seed 0']
    assert 'checkpoint of the reached target' in failures['slow, flops=0.8, seed 0']
    for row in rows[1:3]:
        assert row['macs'] <= 0.8 * rows[0]['macs']
    assert rows[3]['macs'] == rows[0]['macs']
    text = (whole / 'results.md').read_text()
    assert '**failed**: slow, flops=0.8' in text and '| 0 of 1, failed |' in text
    assert (whole / 'curves.svg').stat().st_size > 0

    # The process alone, whose tool goes on; then all of it, asked to end.
    process = start(tmp_path, cut)
    wait_for(cut / 'pruned/M/flops80/seed0/logs/prune.log', process)
    process.kill()
    process.wait()
    process = start(tmp_path, cut, '-j', '2')
    wait_for(cut / 'runs/M/flops80/seed0/logs/deploy.log', process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 143
    assert not (cut / 'results.json').exists()
    assert start(tmp_path, cut, '-j', '2').wait(900) == 1
    assert table_of(cut) == (rows, failures_at(cut, whole, failures))
    deployed = 'runs/M/flops80/seed0/deploy/finetune.pth'
    one, two = (
        torch.load(work / deployed, weights_only=True)['state_dict']
        for work in (whole, cut)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def failures_at(work, other, failures):
    return {n: text.replace(str(other), str(work)) for n, text in failures.items()}
