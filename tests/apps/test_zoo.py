"""The zoo: which configs are tried, what a run survives, and what its page says."""

import json
import os
import time

import pytest
import torch
from support.tooling import ROOT

from mmgfp.apps import zoo, zoo_jobs
from mmgfp.apps.json_lines import append_line
from mmgfp.apps.zoo import (
    CANDIDATES,
    _initialize,
    by_family,
    examine,
    known_of,
    list_configs,
    next_of,
)
from mmgfp.apps.zoo_page import brief, render, tidy

LENET = 'mmpretrain::lenet/lenet5_mnist.py'
FACTS = {'python': '3.11', 'versions': {'mmdet': '3.3.0', 'torch': '2.11.0'}}


def outcome(config, status, reason='', **more):
    return {'config': config, 'status': status, 'reason': reason, 'seconds': 1} | more


def agreement(config, **more):
    numbers = dict(groups=2, units=7, channels=0.5, macs=0.25, compared='loss')
    numbers |= dict(prepare_seconds=0.5, disagreeing={}, frozen={})
    return outcome(config, 'agrees', **numbers | more)


# --- which configs


def test_configs_of_a_library_are_models_not_parts():
    configs = list_configs('mmdet')
    assert 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py' in configs
    assert not [c for c in configs if '/_base_/' in c or '::_base_' in c]


def test_small_models_stand_for_their_family():
    families = by_family(list_configs('mmdet') + list_configs('mmpretrain'))
    first = {names[0] for names in families}
    assert 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py' in first
    assert 'mmpretrain::seresnet/seresnet50_8xb32_in1k.py' in first
    assert len(first) == len(families) > 150


def test_the_next_config_is_tried_only_where_the_loss_does_not_run(monkeypatch):
    monkeypatch.setattr(zoo, '_has_model', lambda config: config != 'parts')
    names = ['a', 'parts', 'b', 'c', 'd']
    assert CANDIDATES == 3
    results = {}
    tried = []
    while (config := next_of(names, results)) is not None:
        tried.append(config)
        results[config] = outcome(config, 'not run')
    assert tried == ['a', 'b', 'c']
    assert [r['config'] for r in known_of(names, results)] == ['a', 'b', 'c']
    for status in ('agrees', 'disagrees', 'failed'):
        assert next_of(names, {'a': outcome('a', status)}) is None
    results['b'] = outcome('b', 'failed')
    assert [r['config'] for r in known_of(names, results)] == ['a', 'b']


# --- running


def test_a_line_cut_short_costs_only_its_own_config(tmp_path, capsys):
    path = tmp_path / 'new' / 'zoo.jsonl'
    assert zoo_jobs.read_results(path) == {}
    append_line(path, outcome('a', 'not run'))
    with path.open('a') as file:
        file.write('{"config": "b", "sta')  # killed while it wrote
    assert list(zoo_jobs.read_results(path)) == ['a']
    assert f'{path}:2 is cut short' in capsys.readouterr().out
    append_line(path, outcome('c', 'failed'))
    append_line(path, outcome('a', 'agrees'))
    assert {c: r['status'] for c, r in zoo_jobs.read_results(path).items()} == {
        'a': 'agrees',
        'c': 'failed',
    }


def play(config, enter):
    """Stands in for `examine`: does what the config's name says."""
    enter('loss')
    if config == 'hangs':
        time.sleep(60)
    if config == 'crashes':
        enter('tracing')
        os._exit(3)
    status = 'not run' if config == 'needs a GPU' else 'agrees'
    return outcome(config, status)


def test_each_config_has_a_process_and_a_time_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / 'zoo.jsonl'
    monkeypatch.setattr(zoo_jobs, 'examine', play)
    known = {'done': outcome('done', 'agrees')}
    families = [['hangs'], ['crashes'], ['needs a GPU', 'plain', 'other'], ['done']]
    start = time.monotonic()
    zoo_jobs.run_all(families, known, path, timeout=2, jobs=2)
    assert time.monotonic() - start < 30
    results = zoo_jobs.read_results(path)
    assert {c: (r['status'], r['reason']) for c, r in results.items()} == {
        'hangs': ('not run', 'loss: no end after 2 s'),
        'crashes': ('failed', 'tracing: process ended with 3'),
        'needs a GPU': ('not run', ''),
        'plain': ('agrees', ''),
    }
    assert set(known) == {*results, 'done'}


@pytest.mark.slow
def test_a_small_config_from_the_command_line(run_tool, tmp_path):
    out, page = tmp_path / 'zoo.jsonl', tmp_path / 'zoo.md'
    broken = outcome(LENET, 'failed', 'tracing: something that was mended')
    out.write_text(json.dumps(broken) + '\n')
    options = ('--families', '--filter', 'mmpretrain::lenet/*', '--json', out)
    done = run_tool('zoo.py', *options, '--page', page)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 1  # known, so not done again
    assert 'something that was mended' in page.read_text()
    done = run_tool('zoo.py', *options, '--page', page, '--retry', 'failed')
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text().splitlines()[-1])
    # Three convolutions and a linear layer, 6 + 16 + 120 + 84 channels, make way for
    # the 10 classes.
    assert result['status'] == 'agrees', result['reason']
    assert result['units'] == 226
    assert result['channels'] == pytest.approx(226 / 236, abs=1e-4)
    assert result['macs'] == 1.0
    assert '| `lenet/lenet5_mnist` | 226 | 95.8% | 100.0% | loss |' in page.read_text()
    assert 'something that was mended' not in page.read_text()


# --- one config


def test_a_config_that_does_not_run_says_at_which_stage(monkeypatch):
    monkeypatch.chdir(ROOT)  # restores the folder that `examine` leaves
    result = examine('mmdet::no/such.py')
    assert result['status'] == 'not run'
    assert result['reason'].startswith('config: FileNotFoundError')


def test_no_layer_starts_blind():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torch.nn.init.zeros_(model[1].weight)
    before = model[0].weight.detach().clone()
    model.init_weights = lambda: None
    _initialize(model)
    assert model[1].weight.all()
    assert torch.equal(model[0].weight, before)


# --- the page


def test_the_page_counts_and_lists_what_became_of_each_config():
    results = [
        outcome('mmdet::a/a1.py', 'not run', 'model: ImportError: Please install lap'),
        agreement('mmdet::a/a2.py', macs=1.0, channels=0.99, units=321),
        agreement(
            'mmdet::b/b.py',
            frozen={
                'an output: reaches the loss without a further layer': 2,
                'read by neck.1: rows are moved by Unfold': 1,
                'read by neck.2: rows are moved by Unfold': 3,
            },
            disagreeing={
                'neck.0': "masked and compact disagree: shape '[2, 8]' is invalid",
                'neck.3': "masked and compact disagree: shape '[4, 8]' is invalid",
            },
        ),
        outcome('mmdet::c/c.py', 'failed', 'tracing: KeyError: "/opt/x/y.py"'),
        outcome('mmpretrain::d/d.py', 'not run', 'loss: no end after 300 s'),
        outcome('mmpretrain::e/e.py', 'not run', 'loss: no end after 300 s'),
        outcome('mmpretrain::f/f.py', 'disagrees', 'outputs differ by 0.5'),
    ]
    page = render(results, FACTS)
    for line in (
        'Measured with Python 3.11, mmdet 3.3.0, torch 2.11.0.',
        '| mmdet | 4 | 3 | 2 | 1 | 2 of 3 (66.7%) |',
        '| mmpretrain | 3 | 1 | 0 | 0 | 0 of 1 (0.0%) |',
        '| `a/a2` | 321 | 99.0% | 100.0% | loss | 1 |  |',
        '| `b/b` | 7 | 50.0% | 25.0% | loss | 1 | 4 × rows are moved by Unfold; '
        '2 × an output |',
        "| `b/b` | 2 | shape '[N, N]' is invalid |",
        '| tracing: KeyError: "y.py" | `mmdet::c/c` |',
        '| outputs differ by 0.5 | `mmpretrain::f/f` |',
        '| missing package | model: ImportError: Please install lap | `mmdet::a/a1` |',
        '| too large for this machine | loss: no end after 300 s | '
        '`mmpretrain::d/d`, `mmpretrain::e/e` |',
    ):
        assert line in page.splitlines()
    assert page.index('missing package') < page.index('too large')


@pytest.mark.parametrize(
    ('reason', 'said'),
    [
        ('at "/tmp/bld/mmcv-2.3.6/ops/roi_align.cpp":138', 'at "roi_align.cpp":138'),
        (
            'see https://github.com/pytorch/pull/1',
            'see https://github.com/pytorch/pull/1',
        ),
        ('shape 3/4\n of a/b/c', 'shape 3/4 of a/b/c'),
    ],
)
def test_reasons_name_no_place_on_this_machine(reason, said):
    assert tidy(reason) == said


def test_a_cause_that_layers_share_is_given_once():
    why = 'TraceError: every layer is left alone because: '
    layers = (f'read by a.{i}: rows are moved by Unfold' for i in range(9))
    results = [outcome('mmdet::a/a.py', 'failed', why + '; '.join(layers))]
    line = f'| {why}rows are moved by Unfold | `mmdet::a/a` |'
    assert line in render(results, FACTS).splitlines()


def test_reasons_of_layers_are_told_alike():
    one = 'read by a.b: its rows cannot be told to images: 1004 images, not 2'
    two = 'read by c.d: its rows cannot be told to images: 77 images, not 2'
    assert brief(one) == brief(two)
    assert brief('masked and compact disagree: outputs differ by 1') == (
        'frozen by the verification'
    )
