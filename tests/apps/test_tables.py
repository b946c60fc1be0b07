"""The table's numbers, worked out by hand."""

import json
import subprocess

import pytest

from mmgfp.apps.tables import commit_of, machine_facts, markdown, table_cells
from mmgfp.report.quantities import main_metric
from mmgfp.utils.errors import ConfigError

HIDDEN = ('latency_ms', 'onnxruntime_ms')
ROWS = [
    {
        'model': 'baseline',
        'metrics': {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.9},
        'macs': 4_000_000_000,
        'memory': 10_000_000,
        'params': 2_500_000,
        'latency_ms': {'1': 40.0, '64': 2000.0},
        'onnxruntime_ms': {'1': 20.0},
    },
    {
        'model': 'pruned',
        'metrics': {'coco/bbox_mAP': 0.4567, 'coco/bbox_mAP_50': 0.8},
        'macs': 2_000_000_000,
        'memory': 6_000_000,
        'params': 1_000_000,
        'latency_ms': {'1': 30.0, '64': 1000.0},
        'onnxruntime_ms': {'1': 5.0},
    },
]


def test_table_cells():
    header, first, second = table_cells(ROWS)
    assert header == [
        *('model', 'mAP', 'MACs (G)', 'memory (M)', 'params (M)'),
        *('CPU, PyTorch (ms)', 'CPU, PyTorch, batch 64 (ms)'),
        'CPU, onnxruntime (ms)',
    ]
    assert first[:3] == ['baseline', '50.0', '4.000 (100%)']
    assert second == [
        *('pruned', '45.7', '2.000 (50%)', '6.000 (60%)', '1.000 (40%)'),
        *('30.0 (75%)', '1000.0 (50%)', '5.0 (25%)'),
    ]


def test_shares_that_were_taken_round_by_round_come_first():
    rows = [ROWS[0], {**ROWS[1], 'latency_ratio': {'1': 0.81}}]
    assert table_cells(rows)[2][-3:] == ['30.0 (81%)', '1000.0 (50%)', '5.0 (25%)']


def test_table_cells_of_models_that_were_not_timed():
    rows = [{k: v for k, v in row.items() if k not in HIDDEN} for row in ROWS]
    header, *_, second = table_cells([{**row, 'macs': 40_812_544} for row in rows])
    assert header == ['model', 'mAP', 'MACs (G)', 'memory (M)', 'params (M)']
    assert second[2] == '0.04081 (100%)'


@pytest.mark.parametrize(
    ('metrics', 'name', 'expected'),
    [
        ({'coco/bbox_mAP': 0.365, 'x': 1}, None, ('mAP', 36.5)),
        ({'accuracy/top1': 76.8}, None, ('top-1', 76.8)),
        ({'f1': 3.0, 'x': 1}, None, ('f1', 3.0)),
        ({}, None, ('mAP', 0.0)),
        ({'coco/bbox_mAP': 0.365, 'x': 1}, 'x', ('x', 1)),
        ({'coco/bbox_mAP': 0.365, 'coco/a': 0.5}, 'coco/a', ('a', 50.0)),
        ({}, 'coco/bbox_mAP_50', ('bbox_mAP_50', 0.0)),
    ],
)
def test_main_metric(metrics, name, expected):
    assert main_metric(metrics, name) == expected


@pytest.mark.parametrize('metrics', [{'accuracy/top1': 76.8}, {}])
def test_metrics_that_a_test_does_not_have_are_refused(metrics):
    with pytest.raises(ConfigError, match='metric must be one of'):
        main_metric(metrics, 'accuracy/top5')


def test_markdown_tells_how_the_numbers_came_about():
    facts = {
        **machine_facts(),
        'configs': ['a.py', 'b.py'],
        'seed': 7,
        'seconds': {'baseline': 12},
        'input_shape': [3, 128, 160],
        'notes': ['U: `normalize=none`'],
        'command': 'python tools/compare.py a.py',
        'commit': 'abc1234-dirty',
    }
    text = markdown(table_cells(ROWS), facts)
    assert text.splitlines()[1] == '|---' + '|---:' * 7 + '|'
    for part in ('| 45.7 |', '3×128×160', '`a.py`, `b.py`', 'seed 7', 'baseline 12 s'):
        assert part in text
    assert '- U: `normalize=none`' in text
    assert '- command: `python tools/compare.py a.py`' in text
    assert '; code of commit abc1234-dirty\n' in text
    assert 'of the last run, where one was cut off' in text
    assert 'torch ' in text
    json.dumps(facts)
    unknown = {k: v for k, v in facts.items() if k != 'command'} | {'commit': None}
    assert 'commit' not in markdown(table_cells(ROWS), unknown)
    # Of times and RoIs only where there are some.
    assert 'median of the ratios of each round' in text and 'RoIs' not in text
    two_stage = {**facts, 'two_stage': True}
    assert 'what comes before the RoIs' in markdown(table_cells(ROWS), two_stage)
    rows = [{k: v for k, v in row.items() if k not in HIDDEN} for row in ROWS]
    untimed = markdown(table_cells(rows), two_stage)
    assert 'CPU is' not in untimed and 'RoIs' not in untimed


def test_the_commit_is_that_of_a_whole_checkout(tmp_path):
    def git(*words):
        identity = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
        subprocess.run(['git', '-C', tmp_path, *identity, *words], check=True)

    assert commit_of(tmp_path) is None
    git('init', '-q')
    (tmp_path / 'inside').mkdir()
    (tmp_path / 'inside/a.txt').write_text('1')
    git('add', '.')
    git('commit', '-q', '-m', 'first')
    commit = commit_of(tmp_path)
    assert len(commit) >= 7 and 'dirty' not in commit
    assert commit_of(tmp_path / 'inside') is None
    (tmp_path / 'inside/a.txt').write_text('2')
    assert commit_of(tmp_path) == f'{commit}-dirty'
