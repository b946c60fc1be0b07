"""The benchmark tool on models of configs, deployed folders and files."""

import io
import json
import sys

import pytest
import torch
from mmengine.config import Config
from rich.console import Console
from support.configs import FASTER, MASK, classifier, slim
from support.plain_onnx import write_plain_onnx
from support.tooling import ROOT, load_tool

from mmgfp.apps.benchmark import time_table
from mmgfp.apps.subjects import Subject, build_graph, peak_memory, resolve
from mmgfp.engine.model_building import build_model

DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits.py'


def small(kind):
    if kind == 'retinanet':
        config = Config.fromfile(DEMO)
        config.model.backbone.base_channels = 8
        config.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
        config.model.bbox_head.update(in_channels=8, feat_channels=8)
        return config
    if kind == 'classifier':
        backbone = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)
        return classifier(backbone, 64)
    return slim({'faster': FASTER, 'mask': MASK}[kind])


@pytest.fixture
def files(tmp_path):
    """Write a config and weights; return a function that does so for a kind."""

    def write(kind):
        config = small(kind)
        config.dump(tmp_path / 'small.py')
        state = build_model(config).state_dict()
        torch.save({'state_dict': state}, tmp_path / 'small.pth')
        return tmp_path / 'small.py', tmp_path / 'small.pth'

    return write


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Run the tool in this process; return the rows it writes."""

    def run(*args):
        out = tmp_path / 'times.json'
        argv = ['benchmark.py', *map(str, args), '--json', str(out)]
        monkeypatch.setattr(sys, 'argv', argv)
        monkeypatch.setattr(torch, 'set_num_threads', lambda number: None)
        load_tool('benchmark').main()
        return json.loads(out.read_text())['rows']

    return run


@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_a_config_and_its_file_in_all_runtimes(kind, files, benchmark, tmp_path):
    config, checkpoint = files(kind)
    model = f'{config}:{checkpoint}'
    size, file = (2, 3, 64, 64), tmp_path / 'small.onnx'
    write_plain_onnx(build_graph(model, 'raw', size), torch.rand(size), file)
    runtimes = ['torch', 'onnxruntime', 'openvino']
    options = ['--batch', 2, '--rounds', 2, '--no-memory', '--input-shape', *size[1:]]
    rows = benchmark(model, file, '--runtime', *runtimes, *options)
    expected = [(model, name) for name in runtimes]
    expected += [(str(file), name) for name in runtimes[1:]]
    assert [(row['model'], row['runtime']) for row in rows] == expected
    assert {row['batch'] for row in rows} == {2}
    for row in rows:
        for key in ('wall_ms', 'cpu_ms', 'wall_ratio', 'cpu_ratio'):
            values = row[key]
            assert 0 < values['low'] <= values['median'] <= values['high']
    assert {row['base'] for row in rows} == {model}
    ones = [row['wall_ratio'] == dict(median=1.0, low=1.0, high=1.0) for row in rows]
    assert ones == [True, True, True, False, False]


def test_a_deployed_folder_at_the_size_that_a_file_fixes(
    files, benchmark, tmp_path, capsys
):
    files('classifier')
    file = tmp_path / 'small.onnx'
    graph = build_graph(resolve(str(tmp_path)), 'end-to-end', (1, 3, 32, 48))
    assert graph.outputs == ('scores',)
    write_plain_onnx(graph, torch.rand(1, 3, 32, 48), file)
    options = ('--runtime', 'onnxruntime', '--rounds', 1, '--batch', 1, 2)
    rows = benchmark(tmp_path, file, *options, '--no-memory')
    assert {tuple(row['input']) for row in rows} == {(3, 32, 48)}
    # The file fixes its batch: it has no row for two images, and a line says why.
    found = [(row['model'], row['batch']) for row in rows]
    assert found == [(str(tmp_path), 1), (str(file), 1), (str(tmp_path), 2)]
    assert 'as the file fixes it (got (2, 3, 32, 48))' in capsys.readouterr().out


def test_memory_is_that_of_the_model(tmp_path):
    """64 MiB of weights more are 64 MiB of growth more, whatever this process holds."""
    growth = []
    for width in (64, 4096):
        weights = torch.ones(width, 4096)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4096, width))
        net[1].weight.data = weights
        net.outputs = ('output',)
        file = tmp_path / f'{width}.onnx'
        write_plain_onnx(net, torch.rand(1, 1, 64, 64), file)
        subject = Subject(str(file), 'onnxruntime', (1, 1, 64, 64), 'raw', 1)
        measured = peak_memory(subject)
        assert measured['growth_mb'] < measured['peak_mb']
        growth.append(measured['growth_mb'])
    # The file and a packed copy of it may be held as well.
    assert 60 < growth[1] - growth[0] < 300


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['/nowhere'], 'model must be a .py config'),
        ([ROOT / 'docs'], 'one config with weights'),
        ([f'{DEMO}:/nowhere.pth'], 'checkpoint must be a checkpoint file'),
        (['/nowhere.onnx', '--runtime', 'onnxruntime'], 'model must be a file'),
        (['/nowhere.xml', '--runtime', 'torch'], 'one that opens .xml files'),
    ],
)
def test_refuses_in_one_line(arguments, words, benchmark):
    with pytest.raises(ValueError, match=words):
        benchmark(*arguments)


def test_names_stay_apart_in_80_columns():
    names = [f'work/{kind}/retinanet_r50_fpn_1x_coco/model.onnx' for kind in 'ab']
    spread = dict(median=1234.5, low=1200.0, high=1300.0)
    ratio = dict(median=0.43, low=0.41, high=0.45)
    shared = dict(runtime='onnxruntime', batch=1, peak_mb=1234.0, growth_mb=345.0)
    shared |= dict(wall_ms=spread, cpu_ms=spread, wall_ratio=ratio, cpu_ratio=ratio)
    table = time_table([dict(model=name, **shared) for name in [*names, names[0]]])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert lines[0] == '1: a/retinanet_r50_fpn_1x_coco/model.onnx'
    assert lines[1] == '2: b/retinanet_r50_fpn_1x_coco/model.onnx'
    cells = [line.split() for line in lines if 'onnxruntime' in line]
    assert [row[0] for row in cells] == ['1', '2', '1']
    numbers = ['1234.5', '1234.5', '0.43', '0.43', '1234']
    assert cells[0] == ['1', 'onnxruntime', '1', *numbers]
    assert sum(line.count('1200.0-1300.0') for line in lines) == 6
    note = ' '.join(lines[-4:])
    assert 'Ratios are taken within each round, and their median is shown' in note


def test_a_config_without_weights_says_so(files, benchmark, capsys):
    config, _ = files('classifier')
    options = ('--runtime', 'torch', '--rounds', 1, '--input-shape', 3, 32, 32)
    benchmark(config, *options, '--no-memory')
    said = capsys.readouterr()
    assert f'{config} has random weights' in said.out
    assert 'timing 1 in turns' in said.err
