"""The benchmarks run on a toy and say what they should; times are not judged."""

import copy
import json

import pytest
import torch
from torch import nn
from toys import ConvPair, ResidualPair, images, square_loss

from benchmarks import __main__ as command
from benchmarks.timing import ratios, spread, take_turns
from benchmarks.traffic import bytes_moved, peak_bytes
from mmgfp.recording import record_work


class ToyCalls:
    """What `BatchCalls` is for a detector."""

    images = 2

    def __init__(self):
        self.batch = images()

    def loss(self, model):
        return square_loss(model(self.batch))

    check = loss

    def work(self, model):
        return record_work(model, self.check, self.images)


class ToySubject:
    label = 'toy'

    def build(self, device):
        return ResidualPair(), ToyCalls()


def test_command_writes_json_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.SUBJECTS, 'toy', ToySubject())
    files = {kind: tmp_path / kind for kind in ('json', 'page')}
    options = [
        part for kind, path in files.items() for part in (f'--{kind}', str(path))
    ]
    command.main(['--models', 'toy', '--repeats', '3', *options])
    results = json.loads(files['json'].read_text())
    assert results['machine']['device'] == 'cpu'
    step = results['step']['toy']
    assert [len(times) for times in step['times'].values()] == [3, 3, 3]
    assert step['bytes_moved']['pruning'] > step['bytes_moved']['plain'] > 0
    assert step['peak_bytes']['pruning'] >= step['peak_bytes']['plain'] > 0
    found = results['discovery']['toy']
    assert found['units'] == step['units'] > 0
    assert {'loss', 'trace', 'groups', 'all'} == set(found['seconds'])
    assert files['page'].read_text().count('| toy |') == 2
    assert files['page'].read_text().strip() == capsys.readouterr().out.strip()


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse_args(['--only', 'step,speed'])
    assert "expected some of step, discovery: ['speed']" in capsys.readouterr().err


def test_actions_take_turns_in_changing_order():
    calls = []
    actions = {name: (lambda name=name: calls.append(name)) for name in 'ab'}
    times = take_turns(actions, 3, 'cpu', warmup=1)
    assert ''.join(calls) == 'baabbaab'
    assert [len(times[name]) for name in 'ab'] == [3, 3]


def test_ratios_are_of_rounds():
    times = {
        'a': [{'wall': 3.0}, {'wall': 10.0}, {'wall': 4.0}],
        'b': [{'wall': 2.0}, {'wall': 10.0}, {'wall': 2.0}],
    }
    found = ratios(times, 'a', 'b', 'wall')
    assert found == [1.5, 1.0, 2.0]
    assert spread(found) == {'median': 1.5, 'low': 1.25, 'high': 1.75}


def test_bytes_moved_by_hand():
    x = torch.ones(1000)  # 4000 bytes
    assert bytes_moved(lambda: x + x) == 3 * 4000
    assert bytes_moved(lambda: x.view(10, 100).t()) == 0
    assert bytes_moved(lambda: x.mul_(2)) == 2 * 4000


def test_peak_by_hand():
    """Two tensors of 4000 bytes live at once, and a model of none."""

    def work():
        for _ in range(3):
            a = torch.ones(1000)
            b = torch.ones(1000)
            del a, b

    assert peak_bytes(work, nn.Identity(), 'cpu') == 8000


def test_models_count_with_gradients_and_momentum():
    model = ConvPair()
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert peak_bytes(lambda: None, model, 'cpu') == 3 * weights + buffers
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert peak_bytes(lambda: None, frozen, 'cpu') == weights + buffers
