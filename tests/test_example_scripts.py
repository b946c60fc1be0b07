"""The scripts in examples/ run as they are, with less of everything."""

import os
import re
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from support.tooling import ROOT

from mmgfp.engine.model_building import build_model

SIZES = {
    'own_model': dict(MMGFP_EPOCHS='6'),
    'one_stage': dict(MMGFP_ITERATIONS='20'),
    'without_training': dict(MMGFP_IMAGES='32'),
    'eight_bits': dict(MMGFP_IMAGES='8'),
    'sparsity': dict(MMGFP_ITERATIONS='4'),
    'two_stage': dict(MMGFP_ITERATIONS='10'),
    'classifier': dict(MMGFP_EPOCHS='2'),
    'several_processes': dict(MMGFP_ITERATIONS='12'),
    'latency_target': dict(MMGFP_ITERATIONS='10', MMGFP_CUTS='8'),
}


def run(name, folder):
    """Run an example with its files in a folder; return what it says."""
    env = {**os.environ, **SIZES[name], 'MMGFP_WORK': str(folder / 'work')}
    env['PYTHONPATH'] = str(ROOT)
    command = [sys.executable, '-W', 'ignore', str(ROOT / f'examples/{name}.py')]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def left(said):
    """The share of the MACs, in percent, that an example says it is pruned to."""
    (share,) = re.findall(r'pruned to ([\d.]+)% of the MACs', said)
    return float(share)


def line(said, word):
    """The one line of an output that begins with a word."""
    (whole,) = re.findall(f'^{word}: .*$', said, re.M)
    return whole


def test_every_script_with_cells_runs_here():
    cells = {
        p.stem for p in (ROOT / 'examples').glob('*.py') if '# %%' in p.read_text()
    }
    assert cells == SIZES.keys()


@pytest.mark.slow
def test_a_model_of_your_own(tmp_path):
    said = run('own_model', tmp_path)
    shares = [float(x) for x in re.findall(r': ([\d.]+)%', said)]
    trained, pruned, tuned = shares
    assert trained > 60 and tuned > 60
    (left,) = re.findall(r'pruned to ([\d.]+)% of the MACs', said)
    assert float(left) <= 50


@pytest.mark.slow
def test_a_one_stage_detector(tmp_path):
    run('one_stage', tmp_path)
    names = {path.name for path in (tmp_path / 'work/small').iterdir()}
    assert {'small.py', 'small.pth', 'structure.json'} <= names
    assert (tmp_path / 'work/prune/report.html').is_file()


@pytest.mark.slow
def test_without_training(tmp_path):
    said = run('without_training', tmp_path)
    assert re.search(r'original: \d+ M MACs, mAP [\d.]+\n', said)
    assert (tmp_path / 'work/report.html').is_file()


@pytest.mark.slow
def test_eight_bits(tmp_path):
    pytest.importorskip('onnxruntime')
    said = run('eight_bits', tmp_path)
    whole, small = (float(x) for x in re.findall(r': ([\d.]+) MB\n', said)[-2:])
    assert small < 0.5 * whole


@pytest.mark.slow
def test_sparsity(tmp_path):
    said = run('sparsity', tmp_path)
    assert '\n50.0% of the weights that could go are left\n' in said


@pytest.mark.slow
def test_a_two_stage_detector(tmp_path):
    said = run('two_stage', tmp_path)
    assert 0 < left(said) <= 50
    trained, tuned = (float(x) for x in re.findall(r'mAP ([\d.]+);', said))
    assert trained > 5 and tuned > 5
    paths = 'work/small/small.py', 'work/faster_rcnn.py'
    small, whole = (build_model(Config.fromfile(tmp_path / path)) for path in paths)
    assert type(small) is type(whole)
    assert small.rpn_head.rpn_conv.out_channels < whole.rpn_head.rpn_conv.out_channels
    widths = [m.roi_head.bbox_head.shared_fcs[0].out_features for m in (small, whole)]
    assert widths[0] < widths[1]
    state = torch.load(tmp_path / 'work/small/small.pth', weights_only=True)
    small.load_state_dict(state['state_dict'])


@pytest.mark.slow
def test_a_classifier_by_one_command(tmp_path):
    said = run('classifier', tmp_path)
    rows = re.findall(r'^([\w-]+): ([\d.]+) M MACs, accuracy ([\d.]+)%$', said, re.M)
    assert [name for name, *_ in rows] == ['baseline', 'pruned', 'fine-tuned']
    whole, *small = (float(macs) for _, macs, _ in rows)
    assert small == [small[0]] * 2 and small[0] <= 0.5 * whole
    assert float(rows[-1][2]) > 60
    assert 'mmgfp' not in (tmp_path / 'work/resnet_digits.py').read_text()
    names = {path.name for path in (tmp_path / 'work/small').iterdir()}
    written = {f'resnet_digits_{stage}.py' for stage in ('prune', 'finetune')}
    assert written | {'report.html', 'deploy'} <= names


@pytest.mark.slow
def test_several_processes_stopped_and_resumed(tmp_path):
    said = run('several_processes', tmp_path)
    (status,) = re.findall(r'^stopped, with status (-?\d+)$', said, re.M)
    assert status != '0'
    assert '\nsame channels: True\n' in said
    if torch.cuda.device_count() < 2:  # kernels of GPUs may differ between runs
        assert '\nsame weights: True\n' in said
    assert 0 < left(said) <= 50
    logs = [p.read_text() for p in (tmp_path / 'work/cut').glob('*/*.log')]
    assert len(logs) == 2 and all(
        'Distributed launcher: pytorch' in log for log in logs
    )


@pytest.mark.slow
def test_a_target_in_milliseconds(tmp_path):
    pytest.importorskip('onnxruntime')
    said = run('latency_target', tmp_path)
    whole, target = (float(x) for x in re.findall(r'(\S+) ms', line(said, 'profiled')))
    assert target == pytest.approx(0.6 * whole, abs=0.01)  # two digits are shown
    predicted, share = re.findall(r'[\d.]+', line(said, 'predicted'))
    assert float(predicted) <= target + 0.01 and float(share) <= 60
    before, after = re.findall(r'(\S+) ms', line(said, 'measured'))
    assert float(after) < float(before)
    assert (tmp_path / 'work/latency.json').is_file()
    assert (tmp_path / 'work/small/small.py').is_file()
