"""Models are timed in turns, warm, and by the median."""

import pytest
import torch
from torch import nn

from mmgfp.apps import latency


class Sleeper(nn.Module):
    """Lets a fake clock run."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, iter(seconds)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self):
        assert not torch.is_grad_enabled()
        self.clock[0] += next(self.seconds)


def test_median_of_warm_passes(monkeypatch):
    """Of each turn the second one counts."""
    clock = [0.0]
    monkeypatch.setattr(latency, '_now', lambda device: clock[0])
    models = {
        'slow': Sleeper(clock, [*[9] * 6, 7, 0.004, 7, 0.5, 7, 0.003]),
        'fast': Sleeper(clock, [*[9] * 6, 7, 0.001, 7, 0.001, 7, 0.001]),
    }
    times = latency.measure_latency(models, lambda model: model(), rounds=3)
    assert times == pytest.approx({'slow': 4.0, 'fast': 1.0}, abs=5e-7)
