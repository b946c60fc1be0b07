"""What folders of runs hold, whichever tool wrote them."""

import json

import pytest

from mmgfp.report.run import TRAINING, read_run, read_runs
from mmgfp.utils.errors import ConfigError

TIMES = [{'latency_ms': {'1': 10.0, '8': 60.0}}, {'latency_ms': {'1': 6.0, '8': 30.0}}]
TIMES[1]['latency_ratio'] = {'1': 0.5, '8': 0.4}
ROWS = [
    {'model': 'baseline', 'macs': 4e9, 'metrics': {'coco/bbox_mAP': 0.375}},
    {'model': 'pruned', 'macs': 1e9, 'metrics': {'coco/bbox_mAP': 0.25}},
]
TIMED = {
    'original': {'macs': 8, 'latency_ms': 10.0, 'latency_ratio': 1.0},
    'pruned': {'macs': 4, 'latency_ms': 6.0, 'latency_ratio': 0.5},
}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def test_tables_of_every_tool(tmp_path):
    write(tmp_path / 'results.json', {'rows': ROWS, 'seed': 0})
    write(tmp_path / 'deploy/summary.json', {'input_shape': [3, 8, 8], **TIMED})
    untrained = [
        {'model': m, 'macs': 2, 'metric': v} for m, v in (('a', 57.1), ('b', 5))
    ]
    write(tmp_path / 'summary.json', {'rows': untrained, 'metric': 'top-1'})
    results, summary, deployed = read_run(tmp_path, 'run').tables
    assert (results.metric, summary.metric, deployed.metric) == ('mAP', 'top-1', None)
    assert [row.metric for row in results.rows] == [37.5, 25.0]
    assert [row.metric for row in summary.rows] == [57.1, 5]
    first, second = deployed.rows
    assert (first.name, second.name) == ('original', 'pruned')
    macs, time = deployed.quantities
    assert (macs.label, time.label) == ('MACs', 'CPU latency, PyTorch')
    assert second.ratio(macs, first) == 0.5
    assert second.ratio(time, first) == 0.5  # of the rounds, not 6 / 10
    assert results.rows[1].ratio(time, results.rows[0]) is None
    rows = [row | times for row, times in zip(ROWS, TIMES, strict=True)]
    write(tmp_path / 'results.json', {'rows': rows})
    results = read_run(tmp_path, 'run').tables[0]
    ratios = [results.rows[1].ratio(q, results.rows[0]) for q in results.quantities]
    assert ratios == [0.25, 0.5, 0.4]


def test_what_was_deployed_is_not_shown_twice(tmp_path):
    """Its times would be others than those of the same model in the results."""
    write(tmp_path / 'deploy/summary.json', TIMED)
    rows = [row | times for row, times in zip(ROWS, TIMES, strict=True)]
    write(tmp_path / 'results.json', {'rows': rows, 'input_shape': [3, 8, 8]})
    [table] = read_run(tmp_path, 'run').tables
    assert table.source.name == 'results.json' and table.input_shape == (3, 8, 8)
    # Of a runtime that the results do not name.
    other = {name: {**row, 'onnxruntime_ms': 5.0} for name, row in TIMED.items()}
    write(tmp_path / 'deploy/summary.json', other)
    _, deployed = read_run(tmp_path, 'run').tables
    assert deployed.times == {'latency_ms', 'onnxruntime_ms'}
    # Of another image, or of a batch that the results lack.
    write(tmp_path / 'deploy/summary.json', {'input_shape': [3, 8, 16], **TIMED})
    assert len(read_run(tmp_path, 'run').tables) == 2
    write(tmp_path / 'deploy/summary.json', TIMED)
    rows = [r | {'latency_ms': {'8': r['latency_ms']['8']}} for r in rows]
    write(tmp_path / 'results.json', {'rows': rows})
    assert len(read_run(tmp_path, 'run').tables) == 2
    # What was pruned without training is another model.
    (tmp_path / 'results.json').rename(tmp_path / 'summary.json')
    assert len(read_run(tmp_path, 'run').tables) == 2


def test_a_model_that_detects_nothing_has_an_map_of_0(tmp_path):
    """As in results.md: COCO's evaluation gives no metrics then."""
    nothing = {**ROWS[1], 'metrics': {}}
    write(tmp_path / 'results.json', {'rows': [ROWS[0], nothing]})
    [table] = read_run(tmp_path, 'run').tables
    assert [row.metric for row in table.rows] == [37.5, 0.0]


@pytest.mark.parametrize(
    ('name', 'is_training'),
    [
        ('iter_40', True),
        ('epoch_3', True),
        ('best_coco_bbox_mAP_epoch_3', True),
        ('best_net_prune_flops50', False),
        ('epoch_net_flops50', False),
        ('iter_flops60', False),
    ],
)
def test_checkpoints_of_training_are_told_by_their_whole_names(name, is_training):
    assert bool(TRAINING.fullmatch(name)) == is_training


def test_means_of_a_comparison(tmp_path):
    metric = {'name': 'mAP', 'mean': 31.5, 'std': 0.5, 'values': [31, 32]}
    rows = [{'model': '-M', 'target': 'flops=0.5', 'macs': 4, 'metric': metric}]
    rows[0]['latency_ms'] = {'1': 2.0, '64': 90.0}
    write(tmp_path / 'results.json', {'rows': rows})
    (table,) = read_run(tmp_path, 'run').tables
    assert table.metric == 'mAP (mean)'
    assert (table.rows[0].name, table.rows[0].metric) == ('-M flops=0.5', 31.5)
    assert [q.label for q in table.quantities[1:]] == [
        'CPU latency, PyTorch',
        'CPU latency, PyTorch, batch 64',
    ]


def test_names_tell_runs_apart(tmp_path):
    for name in ('a/work', 'b/work', 'b/other'):
        write(tmp_path / name / 'results.json', {'rows': ROWS})
    folders = [tmp_path / 'a/work', tmp_path / 'b/work', tmp_path / 'b/other']
    names = [run.name for run in read_runs(folders)]
    assert names == ['a/work', 'b/work', 'b/other']
    assert [run.name for run in read_runs(folders[1:])] == ['work', 'other']
    assert [run.name for run in read_runs(folders[:1] * 2)] == ['work', 'work']


@pytest.mark.parametrize(
    ('files', 'words'),
    [
        ({}, 'the folder of a run .*, where nothing says what was pruned'),
        ({'x.txt': 1}, 'where nothing says what was pruned'),
        ({'summary.json': []}, r'summary\.json must be a summary of mmgfp'),
        ({'summary.json': {'rows': []}}, r'summary\.json must be a summary'),
        ({'results.json': {'rows': [{'macs': 1}]}}, r'results\.json must be a summary'),
    ],
)
def test_other_folders_are_refused(files, words, tmp_path):
    for name, data in files.items():
        write(tmp_path / name, data)
    with pytest.raises(ConfigError, match=words):
        read_run(tmp_path, 'run')
