"""What a comparison takes over from before, with tools that only pretend to train."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support.tooling import ROOT

from mmgfp.apps import pipeline
from mmgfp.apps.compare import runs
from mmgfp.apps.compare.kept_configs import write_config
from mmgfp.apps.compare.report import settings_notes
from mmgfp.apps.compare.results import spread_of, summarize
from mmgfp.apps.compare.runs import RunExecutor
from mmgfp.apps.compare.settings import Comparison
from mmgfp.apps.compare.variants import Variant
from mmgfp.apps.pipeline import Pipeline
from mmgfp.apps.processes import Processes, StageError
from mmgfp.selection.targets import parse_targets

#: As small as configs can be, as reading and writing them takes most of the time.
CONFIGS = dict(
    baseline="model = dict(type='Net')\nload_from = None\n",
    prune="""model = dict(type='Net')
load_from = None
custom_hooks = [dict(type='FisherPruningHook', input_shape=(3, 8, 8))]
""",
    finetune="model = dict(type='PrunedModel')\nload_from = None\n",
)
M = dict(name='M', pruning=dict(normalize='memory'))
LONG = dict(M, name='long', finetune={'train_cfg.max_epochs': 30})
TRAINED = dict(name='on', train={'load_from': '{baseline_checkpoint}'})


def number_of(*parts):
    """Stand for what a model is worth, by all that has made it."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:6], 16) / 2**24


class Tools:
    """Do what the tools do to files, without any model.

    Attributes:
        ran: The stages that were really run, as ``<tool> <folder>``.
        reached: The labels of what pruning reaches; by default all targets.
        kill: The tool that is killed when it has written its files.
    """

    def __init__(self):
        self.ran, self.reached, self.kill = [], None, None

    def __call__(self, pipeline, command, log):
        tool, *args = (Path(command[1]).stem, *command[2:])
        self.ran.append(f'{tool} {pipeline.work_dir.name}')
        getattr(self, tool)(*args)
        if tool == self.kill:
            raise KeyboardInterrupt
        return 0, ''

    def train(self, config, *args):
        cfg = Config.fromfile(config)
        folder = Path(args[args.index('--work-dir') + 1])
        folder.mkdir(parents=True, exist_ok=True)
        start = torch.load(cfg.load_from)['worth'] if cfg.load_from else 0
        worth = number_of(cfg.pretty_text.replace(str(folder.parents[4]), ''), start)
        name = 'iter_9.pth'
        if Path(config).stem == 'prune':
            reached = self.reached or [
                t.label for t in parse_targets(cfg.custom_hooks[0].target)
            ]
            for number, label in enumerate(reached):
                name = f'prune_{label}.pth'
                meta = dict(iter=number)
                torch.save(dict(worth=worth + number, meta=meta), folder / name)
        torch.save(dict(worth=worth, meta=dict(iter=9)), folder / name)
        (folder / 'last_checkpoint').write_text(str(folder / name))

    def deploy_pruned(self, config, checkpoint, *args):
        out = Path(args[args.index('--out') + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / 'finetune.py').write_text('')
        (out / 'finetune.pth').write_bytes(Path(checkpoint).read_bytes())

    def test(self, config, checkpoint, *args):
        path = Path(args[args.index('--json') + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        worth = torch.load(checkpoint)['worth']
        path.write_text(json.dumps({'accuracy/top1': worth * 100}))


@pytest.fixture
def tools(monkeypatch):
    tools = Tools()
    monkeypatch.setattr(Pipeline, '_run_logged', lambda *args: tools(*args))
    calls = type('Calls', (), {'profile': lambda *args: {}})
    monkeypatch.setattr(runs, 'build', lambda *args: (None, calls()))
    monkeypatch.setattr(runs, 'costs_of', lambda *args: dict(macs=1))
    return tools


@pytest.fixture
def original(tmp_path):
    return write_weights(tmp_path / 'original.pth', 0.5)


def write_weights(path, worth):
    torch.save(dict(worth=worth, state_dict=dict(w=torch.ones(1))), path)
    return path


def execute(work_dir, original, *variants, **fields):
    """Return the results of all runs by their names, or why they have none."""
    names = {stage: original.with_name(f'{stage}.py') for stage in CONFIGS}
    for stage, path in names.items():
        path.write_text(CONFIGS[stage])
    variants = tuple(Variant(**variant) for variant in variants)
    fields = dict(targets=[dict(flops=0.7)], seeds=[0]) | fields
    comparison = Comparison(
        **{stage: str(path) for stage, path in names.items()},
        variants=variants,
        checkpoint=str(original),
        **fields,
    )
    run = RunExecutor(comparison, ROOT / 'tools', work_dir, Processes())
    found = {'baseline': run.baseline()}
    for each in comparison.runs:
        try:
            found[each.name] = run(each)
        except StageError as error:
            found[each.name] = str(error)
    return found


def top1(result):
    return result['metrics']['accuracy/top1']


def test_nothing_runs_twice_and_one_pruning_serves_several(tools, original, tmp_path):
    first = execute(tmp_path / 'w', original, M, LONG)
    assert tools.ran.count('train seed0') == 3  # one pruning, two fine-tunings
    values = {top1(result) for result in first.values()}
    assert len(values) == 3
    tools.ran.clear()
    assert execute(tmp_path / 'w', original, M, LONG) == first
    assert not tools.ran
    # In another order, without the one that had pruned, or named otherwise.
    assert execute(tmp_path / 'w', original, LONG, M) == first
    assert execute(tmp_path / 'w', original, LONG) == {
        name: first[name] for name in ('baseline', 'long, flops=0.7, seed 0')
    }
    (renamed,) = [
        value
        for name, value in execute(
            tmp_path / 'w', original, dict(LONG, name='long!')
        ).items()
        if name != 'baseline'
    ]
    assert renamed['variant'] == 'long!'
    assert top1(renamed) == top1(first['long, flops=0.7, seed 0'])
    assert not tools.ran


def test_the_folder_may_be_spelled_otherwise(tools, original, tmp_path, monkeypatch):
    first = execute(tmp_path / 'w', original, M)
    tools.ran.clear()
    monkeypatch.chdir(tmp_path)
    assert execute(Path('w'), original, M) == first
    assert execute(Path('../') / tmp_path.name / 'w', original, M) == first
    assert execute(Path('w'), Path(original.name), M) == first
    assert not tools.ran


def test_what_was_pruned_anew_is_fine_tuned_anew(tools, original, tmp_path):
    work = tmp_path / 'w'
    execute(work, original, M)
    other = dict(M, pruning=dict(normalize='none'))
    failed = execute(work, original, other)['M, flops=0.7, seed 0']
    run = work / 'runs/M/flops70/seed0'
    assert f'delete {run} to make it anew' in failed  # and not the result of before
    remove(run)
    result = execute(work, original, other)['M, flops=0.7, seed 0']
    assert result == execute(work, original, other)['M, flops=0.7, seed 0']
    assert top1(result) != top1(execute(tmp_path / 'v', original, M).popitem()[1])


def remove(folder):
    for path in sorted(folder.rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_other_weights_under_the_same_name_are_noticed(tools, original, tmp_path):
    first = execute(tmp_path / 'w', original, TRAINED)
    write_weights(original, 0.25)
    second = execute(tmp_path / 'w', original, TRAINED)
    assert top1(first['baseline']) == 50 and top1(second['baseline']) == 25
    assert 'with others: load_from' in second['on, seed 0']


def test_a_killed_test_counts_for_nothing(tools, original, tmp_path):
    first = execute(tmp_path / 'w', original, M)
    tools.kill = 'test'
    other = write_weights(tmp_path / 'other.pth', 0.25)
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path / 'w', other, M)
    tools.kill = None
    again = execute(tmp_path / 'w', original, M)
    assert top1(again['baseline']) == top1(first['baseline']) == 50


def test_an_earlier_target_is_not_taken_for_the_last(tools, original, tmp_path):
    tools.reached = ['flops90']
    stations = [[dict(flops=0.9), dict(flops=0.7)]]  # and 70 % is missed
    found = execute(tmp_path, original, M, targets=stations)
    failed = found['M, flops=0.9, then flops=0.7, seed 0']
    assert 'of the reached target flops70 (got prune_flops90.pth as' in failed


def test_several_targets_may_be_reached_in_any_order(tools, original, tmp_path):
    tools.reached = ['flops50', 'memory50']
    both = [[dict(memory=0.5), dict(flops=0.5)]]
    found = execute(tmp_path, original, M, targets=both)
    pruned = found['M, memory=0.5, then flops=0.5, seed 0']['pruned']
    assert pruned.endswith('prune_memory50.pth')  # the last one fulfils both


def test_two_prunings_never_share_a_folder(tools, original, tmp_path):
    """One that left nothing, and another that is named like it now, side by side."""
    execute(tmp_path, original, M)
    remove(tmp_path / 'pruned/M/flops70/seed0/prune')
    (tmp_path / 'pruned/M/flops70/seed0/done/prune.json').unlink()
    remove(tmp_path / 'runs')
    new = dict(name='M', pruning=dict(normalize='none'))
    found = execute(tmp_path, original, new, dict(M, name='old'))
    one, two = (found[f'{name}, flops=0.7, seed 0'] for name in ('M', 'old'))
    assert top1(one) != top1(two) and one['pruned'] != two['pruned']
    found = execute(tmp_path, original, dict(new, name='other'), M)
    assert found['other, flops=0.7, seed 0']['pruned'] == one['pruned']
    assert 'delete' in found['M, flops=0.7, seed 0']


def test_files_that_the_hook_reads_count_like_settings(tools, original, tmp_path):
    ratios = tmp_path / 'ratios.json'
    ratios.write_text('{"ratios": {"a": 0.5}}')
    variant = dict(name='M', pruning=dict(scope='local', ratios=str(ratios)))
    execute(tmp_path / 'w', original, variant)
    ratios.write_text('{"ratios": {"a": 0.25}}')
    found = execute(tmp_path / 'w', original, variant, seeds=[0, 1])
    assert 'delete' in found['M, flops=0.7, seed 0']
    assert top1(found['M, flops=0.7, seed 1'])


def test_results_say_which_code_made_them(tools, original, tmp_path, monkeypatch):
    for commit in ('a1', 'b2'):
        monkeypatch.setattr(pipeline, 'commit_of', lambda folder, c=commit: c)
        variants = [M] if commit == 'a1' else [M, LONG]
        found = execute(tmp_path, original, *variants)
    commits = {name.partition(',')[0]: r['commits'] for name, r in found.items()}
    # The second fine-tuning starts from what the first commit has pruned.
    assert commits == {'baseline': ['a1'], 'M': ['a1'], 'long': ['a1', 'b2']}


def test_a_deleted_note_has_its_stage_run_anew(tools, original, tmp_path):
    found = execute(tmp_path, original, M)
    tools.ran.clear()
    run = tmp_path / 'runs/M/flops70/seed0'
    (run / 'done/test.json').unlink()
    assert execute(tmp_path, original, M) == found
    assert tools.ran == ['test seed0']
    remove(run / 'done')
    remove(run / 'finetune')
    other = dict(M, finetune={'train_cfg.max_epochs': 3})
    failed = execute(tmp_path, original, other)['M, flops=0.7, seed 0']
    assert f'delete {run} to make it anew' in failed


def test_a_stage_that_never_began_may_begin_otherwise(tmp_path):
    path = tmp_path / 'run/finetune.py'
    for number in (1, 2):  # refused or killed before anything was left
        write_config(f'a = {number}', path)
        assert Config.fromfile(path).a == number
    (path.parent / 'finetune').mkdir()
    (path.parent / 'finetune/epoch_1.pth').touch()
    with pytest.raises(StageError, match=f'delete {path.parent} to make it anew'):
        write_config('a = 3', path)
    assert write_config('a = 2', path) == str(path)


def test_targets_on_the_way_have_a_row_of_their_own():
    costs = dict(macs=1)
    metrics = {'accuracy/top1': 50.0}
    facts = dict(variant='M', seed=0, metrics=metrics, costs=costs)
    ways = ('flops=0.7', 'flops=0.9, then flops=0.7')
    rows = summarize([dict(facts, target=way) for way in ways])
    assert [row['target'] for row in rows] == [*ways]


def test_what_cannot_be_measured_has_no_mean_and_stops_no_table():
    nothing, some = {'coco/bbox_mAP_l': -1.0}, {'coco/bbox_mAP_l': 0.5}
    spread = spread_of([some, nothing], 'coco/bbox_mAP_l')
    values = torch.tensor([*spread['values'], spread['mean'], spread['std']])
    assert torch.equal(values.isnan(), torch.tensor([False, True, True, True]))


def test_notes_name_the_config_and_targets_of_a_variant():
    variants = [
        Variant('own', config='other.py'),
        Variant('M', targets=[dict(flops=0.5)]),
    ]
    assert settings_notes(variants) == [
        'own: `config=other.py`',
        "M: `targets=[{'flops': 0.5}]`",
    ]
