"""Scalars of a work directory, those of interrupted runs as well."""

import json

import pytest

from mmgfp.report.history import read_history
from mmgfp.utils.errors import ConfigError


def write(folder, time, lines):
    path = folder / time / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n')
    return path


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    logged = [{'loss': 1.0 / step, 'step': step} for step in (10, 20, 30)]
    cost = {'pruning/macs_ratio': 0.9, 'pruning/macs_remaining': 9e8, 'step': 10}
    write(
        tmp_path, '20260101_000000', [cost, *logged, {'coco/bbox_mAP': 0.5, 'step': 1}]
    )
    write(tmp_path, '20260101_010000', [{'loss': 7.0, 'lr': 0.1, 'step': 20}])
    history = read_history(tmp_path)
    assert history.loss == {10: 0.1, 20: 7.0}
    assert history.shares == {'macs': {10: 0.9}}
    assert history.series['coco/bbox_mAP'] == {1: 0.5}  # its steps are epochs


def test_a_run_that_begins_anew_replaces_all(tmp_path):
    """As after the checkpoints in a folder were deleted."""
    cost = {'pruning/latency_ratio': 0.9, 'step': 5}
    loss = [{'loss': 1.0, 'step': step} for step in (10, 20, 30)]
    write(tmp_path, '20260101_000000', [cost, *loss])
    write(tmp_path, '20260101_010000', [{'loss': 7.0, 'step': 10}])
    assert read_history(tmp_path).series == {'loss': {10: 7.0}}


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    path = write(tmp_path, '1', [{'loss': float('nan'), 'step': 1}])
    path.write_text(path.read_text() + '{"loss": 2.0, "step": 2}\n{"loss": 3.0, "st')
    assert read_history(tmp_path).loss == {2: 2.0}
    assert read_history(tmp_path / 'nowhere').series == {}


@pytest.mark.parametrize(
    'text', ['{"loss"\n{"loss": 1, "step": 2}\n', '[1]\n', '{"a": 1}']
)
def test_other_files_are_refused(text, tmp_path):
    path = write(tmp_path, '1', [])
    path.write_text(text)
    with pytest.raises(ConfigError, match=r'scalars\.json must be lines of JSON'):
        read_history(tmp_path)
