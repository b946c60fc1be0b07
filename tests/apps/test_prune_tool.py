"""The tool that prunes without training, on every kind of model."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from support.html import Page
from support.runs import assert_equal
from support.small_configs import config_of
from support.tooling import ROOT, load_tool

from mmgfp.apps.prune_outcome import beyond_target, left_alone
from mmgfp.apps.prune_recipe import Recipe, pruning_options, shares_of
from mmgfp.apps.refitting_data import refitting_batches
from mmgfp.apps.rounds_file import RoundsFile
from mmgfp.config import PruningConfig
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.deploy import read_deployable
from mmgfp.engine.model_building import build_model
from mmgfp.groups import ChannelGroup, Grouping, Member
from mmgfp.report.quantities import main_metric
from mmgfp.selection.greedy import Limits
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError, StructureError


def start(folder, kind):
    """A config that knows nothing of pruning, and a checkpoint."""
    config, path = config_of(folder, kind), folder / 'net.py'
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    config.dump(path)
    torch.manual_seed(0)
    weights = build_model(Config.fromfile(path)).state_dict()
    torch.save({'state_dict': weights}, folder / 'start.pth')
    return path, folder / 'start.pth'


def test_images_are_those_of_training_as_in_testing(tmp_path):
    """Resized with their boxes, which testing keeps at the size of the file."""
    cfg = config_of(tmp_path, 'retinanet')
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'] == 'Resize':
            step['scale'] = (128, 128)
    batches = refitting_batches(cfg, 12, 4)
    assert [len(batch['inputs']) for batch in batches] == [4, 4, 4]
    names = [s.img_path for batch in batches for s in batch['data_samples']]
    assert len(set(names)) == 12
    shapes = {tuple(image.shape) for b in batches for image in b['inputs']}
    assert shapes == {(3, 128, 128)}
    root = cfg.train_dataloader.dataset.data_root
    coco = json.loads(Path(root, 'annotations/train.json').read_text())
    ids = {image['file_name']: image['id'] for image in coco['images']}
    sample = batches[0]['data_samples'][0]
    image = ids[sample.img_path.rpartition('/')[2]]
    boxes = [a['bbox'] for a in coco['annotations'] if a['image_id'] == image]
    corners = [[2 * x, 2 * y, 2 * (x + w), 2 * (y + h)] for x, y, w, h in boxes]
    assert sample.gt_instances.bboxes.tensor.tolist() == corners
    again = refitting_batches(cfg, 12, 4)
    assert [s.img_path for b in again for s in b['data_samples']] == names
    assert not BatchCalls(build_model(cfg), batches[0]).without_boxes


def strip_labels(folder):
    """Take all annotations away: boxes of a file, or folders named after classes."""
    path = folder / 'digits/annotations/train.json'
    if path.is_file():
        coco = json.loads(path.read_text())
        del coco['annotations']
        path.write_text(json.dumps(coco))
        return []
    for image in folder.glob('images/*/*.png'):
        image.rename(folder / 'images' / image.name)
    for empty in folder.glob('images/*/'):
        empty.rmdir()
    return ['--cfg-options', 'train_dataloader.dataset.with_label=False']


@pytest.mark.parametrize('kind', ['retinanet', 'classifier'])
def test_images_without_annotations(kind, tmp_path):
    cfg = config_of(tmp_path, kind)
    options = strip_labels(tmp_path)
    if options:
        cfg.train_dataloader.dataset.with_label = False
    else:
        cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
        with pytest.raises(ConfigError):  # none is left
            refitting_batches(cfg, 12, 4)
    batches = refitting_batches(cfg, 16, 4, annotated=False)
    samples = [s for batch in batches for s in batch['data_samples']]
    assert len({s.img_path for s in samples}) == 16
    for sample in samples:
        assert 'gt_label' not in sample
        assert len(sample.get('gt_instances', ())) == 0
    testing = cfg.val_dataloader
    cfg.val_dataloader = cfg.test_dataloader = None
    with pytest.raises(ConfigError, match='--label-free .*none in val_dataloader'):
        refitting_batches(cfg, 16, 4, annotated=False)
    del cfg.train_dataloader.dataset['pipeline']
    cfg.val_dataloader = testing
    with pytest.raises(ConfigError, match='none in the dataset of train_dataloader'):
        refitting_batches(cfg, 16, 4, annotated=False)


def test_augmented_images_are_the_same_in_each_run(tmp_path):
    """Those of a config without a pipeline of testing."""
    cfg = config_of(tmp_path, 'classifier')
    cfg.val_dataloader = cfg.test_dataloader = None
    crop = dict(type='RandomCrop', crop_size=32)
    cfg.train_dataloader.dataset.pipeline.insert(1, crop)
    state = np.random.get_state()[1].copy()
    one, two, other = (refitting_batches(cfg, 8, 4, seed) for seed in (0, 0, 1))
    assert (np.random.get_state()[1] == state).all()
    assert_equal([b['inputs'] for b in one], [b['inputs'] for b in two])
    assert not torch.equal(one[0]['inputs'], other[0]['inputs'])


def command(folder, kind, work='work', **options):
    """The arguments of a run on 8 images, and those given by name."""
    config, checkpoint = start(folder, kind)
    options = {'target': 'flops=0.6', 'images': 8, 'batch-size': 2, **options}
    options = {'divisor': 2, 'work-dir': folder / work, **options}
    given = [['prune.py', config, checkpoint, '--no-train']]
    given += [
        [f'--{name}', *(value if isinstance(value, list) else [value])]
        for name, value in options.items()
    ]
    return [str(word) for words in given for word in words]


def succeed(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_the_tool_prunes_tests_and_deploys(kind, run_tool, tmp_path):
    work = tmp_path / 'work'
    done = succeed(run_tool(*command(tmp_path, kind, rounds=2)))
    config = tmp_path / 'net.py'
    assert '2 cuts in' in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith('cut ')]
    assert [line[:6] for line in lines] == ['cut 1:', 'cut 2:']
    said = json.loads((work / 'summary.json').read_text())
    before, after = said['rows']
    assert after['macs'] <= 0.6 * before['macs'] and 'metric' in after
    refitted = [x for r in said['rounds'] for x in r['layers'] if not x['reason']]
    assert refitted and all(x['after'] < x['before'] for x in refitted)
    name = 'net_flops60'
    # With the original's config and with the one that was written.
    for cfg in (config, work / f'{name}.py'):
        item = read_deployable(Config.fromfile(cfg), work / f'{name}.pth')
        assert item.meta['costs']['macs']['ratio'] <= 0.6
    metrics = tmp_path / 'metrics.json'
    files = work / f'{name}.py', work / f'{name}.pth'
    succeed(run_tool('test.py', *files, '--json', metrics))
    tested = main_metric(json.loads(metrics.read_text()))[1]
    assert after['metric'] == pytest.approx(tested)
    assert not (work / 'rounds.pth').exists()
    page = Page((work / 'report.html').read_text())
    _, rows = page.table('measured')
    assert [*rows] == ['original', 'pruned'] and page.table('channels')[1]
    assert 'costs' not in page.tables  # as that table has them
    assert 'Nothing here was timed: ' in page.text and 'Times are' not in page.text
    if kind == 'classifier':
        assert 'detections' not in done.stdout and 'Detections' not in page.text
    else:
        assert page.table('detections')[0] == ['image', 'original', 'pruned']


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_the_tool_needs_no_labels(kind, run_tool, tmp_path):
    options = {'rounds': ['0.8', '0.6'], 'max-images': 0, 'export': 'onnx'}
    arguments = command(tmp_path, kind, **options)
    arguments += ['--label-free', *strip_labels(tmp_path)]
    done = succeed(run_tool(*arguments))
    said = json.loads((tmp_path / 'work/summary.json').read_text())
    assert [r['target']['flops'] for r in said['rounds']] == [0.8, 0.6]
    before, after = said['rows']
    assert after['macs'] <= 0.6 * before['macs'] and 'metric' not in after
    refitted = [x for r in said['rounds'] for x in r['layers'] if not x['reason']]
    assert refitted and all(x['after'] < x['before'] for x in refitted)
    assert list(said['exported']) == ['net_flops60.onnx']
    assert 'onnxruntime' in done.stdout
    assert (tmp_path / 'work/net_flops60.onnx').is_file()


@pytest.mark.slow
def test_a_target_out_of_reach_is_refused_before_anything_is_tested(run_tool, tmp_path):
    def has_tested():
        return any((tmp_path / 'work/logs').rglob('*.json'))

    arguments = command(tmp_path, 'classifier', divisor=64)
    done = run_tool(*arguments)
    assert done.returncode == 2 and 'target.flops must be at least' in done.stderr
    assert 'a smaller divisor: divisor=1 leaves' in done.stderr
    assert not has_tested() and not any(tmp_path.glob('work/*.pth'))
    arguments[arguments.index('64')] = '2'
    succeed(run_tool(*arguments))
    assert has_tested()


@pytest.mark.slow
def test_one_batch_will_do_where_nothing_is_refitted_and_what_nothing_reads_goes(
    run_tool, tmp_path
):
    options = {'images': 2, 'compensate': 'none', 'rounds': 1, 'max-images': 0}
    arguments = command(tmp_path, 'retinanet', **options)
    cfg = Config.fromfile(arguments[1])
    cfg.model.backbone.out_indices = (0, 1, 2)  # the last stage runs all the same
    cfg.model.neck.in_channels = [8, 16, 32]
    cfg.dump(arguments[1])
    torch.save(
        {'state_dict': build_model(cfg).state_dict()},
        arguments[2],
    )
    done = succeed(run_tool(*arguments))
    assert 'nothing reads backbone.layer4: gone' in done.stdout
    assert 'costs are counted for an image of (3, ' in done.stdout
    assert 'earlier call' not in done.stdout
    again = succeed(run_tool(*arguments)).stdout
    assert 'the result of an earlier call is replaced' in again
    # What is never scored stays until then, which a table tells and a run refuses.
    table = tmp_path / 'analysis.json'
    done = run_tool(
        'analyze.py', arguments[1], '--input-shape', 3, 64, 64, '--json', table
    )
    found = json.loads(succeed(done).stdout and table.read_text())
    assert {name.split('.')[1] for name in found['unscored']} == {'layer4'}
    assert 'the loss does not depend on backbone.layer4.0.conv1' in done.stdout
    arguments[arguments.index('flops=0.6')] = 'flops=0.13'
    arguments[arguments.index('--work-dir') + 1] = str(tmp_path / 'other')
    done = run_tool(*arguments)
    assert done.returncode == 2
    assert 'nothing is known of backbone.layer4' in done.stderr
    assert found['least']['macs'] > 0.13
    saved = torch.load(tmp_path / 'work/net_flops60.pth', weights_only=True)
    assert not any(n.startswith('backbone.layer4') for n in saved['state_dict'])
    small = build_model(Config.fromfile(tmp_path / 'work/net_flops60.py'))
    small.load_state_dict(saved['state_dict'])
    _, after = json.loads((tmp_path / 'work/summary.json').read_text())['rows']
    assert after['params'] == sum(p.numel() for p in small.parameters())
    # The file and the report say the same, once, and that the layers are gone.
    assert saved['meta']['costs']['params']['remaining'] == after['params']
    page = Page((tmp_path / 'work/report.html').read_text())
    assert 'measured' in page.tables and 'costs' not in page.tables
    _, rows = page.table('channels')
    gone = [rows[n][1].text for n in rows if n.startswith('backbone.layer4')]
    assert gone and set(gone) == {'0 (removed)'}
    _, rows = page.table('groups')
    assert rows['backbone.layer4.0.conv1'][1].text == '0'


def killed_after(rounds, arguments, file):
    """Start a run, and kill it once its file tells of so many rounds."""
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / arguments[0])]
        + arguments[1:],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if file.is_file():
            saved = torch.load(file, weights_only=True)
            if len(saved['state']['rounds']) >= rounds:
                break
        time.sleep(0.02)
    process.kill()
    return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['faster', 'classifier'])
def test_a_killed_run_goes_on_bit_by_bit(kind, run_tool, tmp_path):
    # No tests, so that what is left of a killed run is the rounds.
    options = {'rounds': ['0.9', '0.8', '0.7', '0.6'], 'max-images': 0}
    whole = command(tmp_path, kind, 'whole', **options)
    cut = command(tmp_path, kind, 'cut', **options)
    file = tmp_path / 'cut/rounds.pth'
    succeed(run_tool(*whole))
    assert killed_after(2, cut, file) == -signal.SIGKILL
    other = command(tmp_path, kind, 'cut', **options, images=6)
    done = run_tool(*other)
    words = 'images=8 instead of 6); run the command that began it, delete that file'
    assert (
        done.returncode == 2
        and words in done.stderr
        and str(file.parent) in done.stderr
    )
    done = succeed(run_tool(*cut))
    assert 'going on after cut' in done.stderr and 'cut 4:' in done.stderr
    assert 'cut 1:' not in done.stderr and not file.exists()
    both = [
        torch.load(tmp_path / work / 'net_flops60.pth', weights_only=True)
        for work in ('whole', 'cut')
    ]
    assert_equal(*both)
    said = [
        json.loads((tmp_path / work / 'summary.json').read_text())
        for work in ('whole', 'cut')
    ]
    assert all(s.pop('seconds') > 0 for s in said) and said[0] == said[1]


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (None, [0.6**0.5, 0.6]),
        (['1'], [0.6]),
        (['2'], [0.6**0.5, 0.6]),
        (['0.6'], [0.6]),
        (['.9', '0.8', '0.6'], [0.9, 0.8, 0.6]),
    ],
)
def test_rounds_are_a_number_or_shares(words, expected):
    options = PruningConfig(target=dict(flops=0.6))
    assert shares_of(options, words) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('words', 'problem'),
    [
        ('0', r'0.6 \(got 0\); end with it; a whole number is a number of cuts'),
        ('-1', 'the last one is the target, 0.6'),
        ('0.8 0.5', 'the last one is the target, 0.6'),
        ('2 3', 'the last one is the target'),
        ('0.7 0.8 0.6', 'shares below 1 that fall to the target, 0.6'),
        ('1.0 0.6', 'below 1'),
        ('0.6 0.6', 'below 1'),
        ('nan 0.6', 'below 1'),
        ('two', 'a number of cuts, or shares of the cost .*got two'),
    ],
)
def test_wrong_rounds_are_refused(words, problem):
    options = PruningConfig(target=dict(flops=0.6))
    with pytest.raises(ConfigError, match=f'^--rounds must be .*{problem}'):
        shares_of(options, words.split())


def recipe(**changes):
    options = PruningConfig(target=dict(flops=0.6), keep=['head*'])
    return replace(Recipe(options, 'fisher', [0.8, 0.6], 8), **changes)


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    cfg = config_of(tmp_path, 'classifier')
    weights = tmp_path / 'net.pth'
    weights.write_bytes(b'weights')

    def file(cfg=cfg, **changes):
        settings = recipe(**changes).settings(cfg, str(weights))
        return RoundsFile(tmp_path / 'work', settings)

    new = file()
    assert new.state is None and new.seconds == new.rounds == 0
    new.write({'rounds': [{}, {}]}, 12.5)
    again = file()
    assert again.rounds == 2 and again.seconds == 12.5
    for changes, words in (
        (dict(label_free=True), 'label-free=False instead of True'),
        (dict(shares=[0.6]), r'rounds=\[0.8, 0.6\] instead of \[0.6\]'),
        (dict(compensate='none'), "compensate='fisher' instead of 'none'"),
        (dict(options=PruningConfig(target=dict(flops=0.6))), 'keep='),
    ):
        with pytest.raises(ConfigError, match=f'{tmp_path}/work, whose .*{words}'):
            file(**changes)
    other = config_of(tmp_path, 'classifier')
    other.train_dataloader.batch_size = 3
    with pytest.raises(ConfigError, match='CONFIG='):
        file(other)
    weights.write_bytes(b'others')
    with pytest.raises(ConfigError, match='CHECKPOINT='):
        file()
    new.path.write_bytes(b'no checkpoint')
    with pytest.raises(StructureError, match='rounds.pth'):
        file()
    new.remove(), new.remove()
    assert file().state is None


def test_what_is_refused(tmp_path):
    cfg = config_of(tmp_path, 'classifier')
    with pytest.raises(ConfigError, match='--images must be at least 2 batches of 4'):
        refitting_batches(cfg, 7)
    assert len(refitting_batches(cfg, 7, least=1)) == 1
    cfg.train_dataloader = None
    with pytest.raises(ConfigError, match='train_dataloader must be in the config'):
        refitting_batches(cfg, 7)
    with pytest.raises(ConfigError, match='target'):
        pruning_options(cfg, target=dict(speed=0.5))


def test_what_stayed_is_said():
    """Groups that are too narrow for the divisor, and layers that kept weights."""
    member = Member('stem.weight', 0, np.zeros((8, 1), int), 'out')
    grouping = Grouping((ChannelGroup('stem', (member,)),), (), {})
    reports = [SimpleNamespace(reason=reason) for reason in ('', 'shared', 'shared')]
    pruned = SimpleNamespace(
        discovery=SimpleNamespace(grouping=grouping),
        structure=PruneStructure(),
        rounds=[SimpleNamespace(layers=reports)],
    )
    kept = '2 of 3 layers keep their weights: shared'
    for divisor, narrow in ((8, 1), (4, 0)):
        pruned.limits = Limits.of(np.array([8]), np.array([1]), divisor=divisor)
        lines = left_alone(SimpleNamespace(pruned=pruned))
        assert lines[narrow:] == [kept]
        assert all('under divisor=8: stem; a smaller' in x for x in lines[:narrow])


@pytest.mark.parametrize(
    ('cut', 'left', 'dead', 'divisor', 'why'),
    [
        (0.499, 0.499, (), 8, None),
        (0.45, 0.45, (), 8, ': widths come to rest at multiples of 8 (--divisor)'),
        (0.45, 0.45, (), 1, ''),
        (0.497, 0.45, ('neck',), 8, ': what nothing reads went after the last cut'),
        (0.49, 0.4, ('neck',), 8, 'multiples of 8 (--divisor) and what nothing reads'),
    ],
)
def test_why_less_is_left_than_was_asked_for(cut, left, dead, divisor, why):
    limits = Limits.of(np.array([8]), np.array([1]), divisor=divisor)
    outcome = SimpleNamespace(
        options=PruningConfig(target=dict(flops=0.5)),
        pruned=SimpleNamespace(rounds=[SimpleNamespace(share=cut)], limits=limits),
        rows=[dict(macs=1000), dict(macs=1000 * left)],
        dead=SimpleNamespace(names=dead),
    )
    said = beyond_target(outcome)
    if why is None:
        assert said == ''
        return
    start = f'{left:.1%} of flops are left, 50% were asked for; the last cut ended at '
    assert said.startswith(f'{start}{cut:.1%}') and why in said
    assert (':' in said) == bool(why)


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--no-train'], 'checkpoint must be'),
        (['--no-train', '--export', 'tflite'], 'one of onnx.*got tflite'),
        (['--no-train', '--nms'], '--nms must be given with --export'),
    ],
)
def test_errors_come_in_one_line(flags, words, monkeypatch):
    args = ['prune.py', 'net.py', 'net.pth', '--target', 'flops=0.5', '--work-dir', 'x']
    monkeypatch.setattr('sys.argv', [*args, *flags])
    with pytest.raises(ConfigError, match=words):
        load_tool('prune').main()
