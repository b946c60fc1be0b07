"""The scripts in examples/ run as they are, with less of everything."""

import os
import re
import subprocess
import sys

import pytest
from support.tooling import ROOT

SIZES = {
    'own_model': dict(MMGFP_EPOCHS='6'),
    'one_stage': dict(MMGFP_ITERATIONS='20'),
    'without_training': dict(MMGFP_IMAGES='32'),
    'eight_bits': dict(MMGFP_IMAGES='8'),
    'sparsity': dict(MMGFP_ITERATIONS='4'),
}


def run(name, folder):
    """Run an example with its files in a folder; return what it says."""
    env = {**os.environ, **SIZES[name], 'MMGFP_WORK': str(folder / 'work')}
    env['PYTHONPATH'] = str(ROOT)
    command = [sys.executable, '-W', 'ignore', str(ROOT / f'examples/{name}.py')]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
