"""Models are timed in turns, warm, by the median, and in the runtimes there are."""

import sys

import pytest
import torch
from torch import nn

from mmgfp.apps.latency import measure_runtimes
from mmgfp.runtimes import timing

CLOCKS = ('latency', 'latency_cpu')
IN_PYTORCH = {f'{clock}_{what}' for clock in CLOCKS for what in ('ms', 'ratio')}


class Sleeper(nn.Module):
    """Lets a fake clock run; code that no exporter follows."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, iter(seconds)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image=None):
        assert not torch.is_grad_enabled()
        self.clock[0] += next(self.seconds)


def test_median_of_warm_passes(monkeypatch):
    """Of each turn the second one counts; without onnxruntime PyTorch is timed."""
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    clock = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])
    models = {
        'slow': Sleeper(clock, [*[9] * 6, 7, 0.004, 7, 0.5, 7, 0.003]),
        'fast': Sleeper(clock, [*[9] * 6, 7, 0.001, 7, 0.001, 7, 0.001]),
    }
    size = (1, 3, 8, 8)
    times, reason = measure_runtimes(models, lambda model: model(), size, rounds=3)
    assert times.keys() == IN_PYTORCH
    expected = {'slow': 4.0, 'fast': 1.0}
    assert times['latency_ms'] == pytest.approx(expected, abs=5e-7)
    # Of rounds with 1 / 4, 1 / 500 and 1 / 3.
    assert times['latency_ratio'] == pytest.approx({'slow': 1.0, 'fast': 1 / 4})
    assert 'no time in onnxruntime' in reason
    assert 'the package onnxruntime must be installed' in reason
    assert '\n' not in reason


class Unexportable(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image):
        return torch.linalg.svd(image)[0] * self.weight


def test_a_model_that_cannot_be_exported_is_timed_in_pytorch():
    models = {'net': nn.Conv2d(3, 2, 1).eval(), 'svd': Unexportable().eval()}
    image = torch.rand(1, 3, 8, 8)
    times, reason = measure_runtimes(models, lambda m: m(image), image.shape, 1)
    assert times.keys() == IN_PYTORCH
    assert times['latency_ms'].keys() == models.keys()
    assert 'svd' in reason
    assert '\n' not in reason
    del models['svd']
    times, reason = measure_runtimes(models, lambda m: m(image), image.shape, 1)
    assert reason is None
    assert min(by_model['net'] for by_model in times.values()) > 0
    in_onnxruntime = {key.replace('latency', 'onnxruntime') for key in IN_PYTORCH}
    assert times.keys() == IN_PYTORCH | in_onnxruntime
