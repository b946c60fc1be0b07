"""Trial runs leave a model as it was, and it can be copied after them."""

import copy

import pytest
import torch
from mmengine.structures import InstanceData
from support.toys import ConvPair, images
from torch import nn

from mmgfp.utils.trial_runs import copy_module


class Keeper(nn.Module):
    """Keeps raw outputs from one forward to the next, as some heads do."""

    def __init__(self):
        super().__init__()
        self.net = ConvPair()

    def forward(self, x):
        self.raw = {'levels': [self.net(x)], 'data': InstanceData(y=self.net(x)[:, 0])}
        return self.raw['levels'][0]


def test_a_module_that_keeps_outputs_can_be_copied():
    model = Keeper()
    y = model(images())
    with pytest.raises(RuntimeError, match='deepcopy'):
        copy.deepcopy(model)
    copied = copy_module(model)
    assert torch.equal(copied.raw['levels'][0], y)
    assert copied.raw['levels'][0].grad_fn is None
    assert torch.equal(copied.raw['data'].y, y[:, 0])
    assert y.grad_fn is not None  # the original can still go backward
    y.sum().backward()
    assert all(p.grad is None for p in copied.parameters())
    assert all(
        torch.equal(a, b) and a is not b
        for a, b in zip(model.parameters(), copied.parameters(), strict=True)
    )
