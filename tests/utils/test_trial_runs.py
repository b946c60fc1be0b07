"""Trial runs leave a model as it was, and it can be copied after them."""

import copy

import pytest
import torch
from mmengine.structures import InstanceData
from support.toys import ConvPair, images
from torch import nn
from torch.nn.utils import parametrizations

from mmgfp.utils.trial_runs import copy_module, undisturbed


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


class Buffered(nn.Module):
    """Changes its buffer in each forward: its values, its size or the tensor."""

    def __init__(self, change):
        super().__init__()
        self.register_buffer('seen', torch.ones(3))
        self.change = change

    def forward(self, x):
        self.change(self)
        return x


BUFFERED = {
    'values': lambda: Buffered(lambda m: m.seen.add_(1)),
    'size': lambda: Buffered(lambda m: m.seen.resize_(5).fill_(2)),
    'tensor': lambda: Buffered(lambda m: setattr(m, 'seen', m.seen + 1)),
    'larger tensor': lambda: Buffered(lambda m: setattr(m, 'seen', torch.ones(9))),
    'spectral norm': lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    'old spectral norm': lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    'batch norm': lambda: nn.BatchNorm1d(3),
}


@pytest.mark.parametrize('kind', BUFFERED)
def test_buffers_are_the_same_tensors_with_the_same_values(kind):
    torch.manual_seed(0)
    model = BUFFERED[kind]()
    before = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in before.items()}
    with undisturbed(model):
        model(torch.randn(2, 3))
    after = dict(model.named_buffers())
    assert values and after.keys() == values.keys()
    assert all(after[n] is before[n] for n in values)
    assert all(torch.equal(after[n], values[n]) for n in values)
