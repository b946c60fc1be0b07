"""Trial runs leave a model as it was, and it can be copied after them."""

import copy

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from support.toys import ConvPair, images
from torch import nn
from torch.nn.utils import parametrizations

from mmgfp import GroupFisherPruner
from mmgfp.discovery.verify import masked_and_compact
from mmgfp.utils.errors import ConfigError
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


def net_around(layer):
    ends = nn.Conv2d(3, 4, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(4, 2, 3)
    return nn.Sequential(*ends, nn.ReLU(), nn.Conv2d(2, 3, 1))


PARAMETRIZED = {
    'spectral norm': parametrizations.spectral_norm,
    'old spectral norm': nn.utils.spectral_norm,
    'weight norm': parametrizations.weight_norm,
    'orthogonal': parametrizations.orthogonal,
}


@pytest.mark.parametrize('kind', PARAMETRIZED)
def test_parametrised_layers_are_left_alone_and_no_buffer_changes(kind):
    torch.manual_seed(0)
    model = net_around(PARAMETRIZED[kind](nn.Conv2d(4, 4, 3)))
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pruner = GroupFisherPruner(model, interval=1, target=dict(flops=0.95))
    image = torch.rand(2, 3, 12, 12)
    grouping = pruner.prepare(lambda m: m(image).sum(), lambda m: m(image), 2)
    assert {f.layer for f in grouping.frozen} == {'0', '2', '6'}
    assert [g.name for g in grouping.groups] == ['4']
    assert all(torch.equal(b, values[n]) for n, b in model.named_buffers())


COMPILED = {
    'scripted conv': lambda: torch.jit.script(nn.Conv2d(4, 4, 3)),
    'scripted norm': lambda: torch.jit.script(nn.BatchNorm2d(4)),
    'scripted block': lambda: torch.jit.script(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    ),
    'traced block': lambda: torch.jit.trace(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), torch.rand(2, 4, 8, 8)
    ),
}


@pytest.mark.parametrize('kind', COMPILED)
@pytest.mark.parametrize('calls', [0, 3])  # torch.jit optimizes after the first ones
def test_compiled_parts_are_left_alone(kind, calls):
    torch.manual_seed(0)
    model, image = net_around(COMPILED[kind]()), torch.rand(2, 3, 12, 12)
    for _ in range(calls):
        model(image).sum().backward()
    pruner = GroupFisherPruner(model, interval=1, target=dict(flops=0.95))
    grouping = pruner.prepare(lambda m: m(image).sum(), lambda m: m(image), 2)
    assert [g.name for g in grouping.groups] == ['4']
    reasons = {f.layer: f.reason for f in grouping.frozen}
    assert 'compiled by torch.jit' in reasons['0']
    masked, small = masked_and_compact(
        model.eval(), grouping.groups, np.array([False, True])
    )
    assert small[4].out_channels == 1
    torch.testing.assert_close(small(image), masked(image))


def test_compiled_modules_are_refused():
    words = r'model must be a module not compiled by torch.jit.*prune first'
    for kind in ('scripted block', 'traced block'):
        with pytest.raises(ConfigError, match=words):
            GroupFisherPruner(COMPILED[kind](), interval=1)


class Swish(nn.Module):
    """Names its channels, as many modules do."""

    def __init__(self):
        super().__init__()
        self.in_channels = self.out_channels = 4

    def forward(self, x):
        return x * torch.sigmoid(x)


def test_compiled_parts_that_name_their_channels_are_passed_over():
    model, image = net_around(torch.jit.script(Swish())), torch.rand(2, 3, 12, 12)
    pruner = GroupFisherPruner(model, interval=1)
    grouping = pruner.prepare(lambda m: m(image).sum(), lambda m: m(image), 2)
    assert [g.name for g in grouping.groups] == ['0', '4']


@pytest.mark.parametrize('compiled', ['scripted conv', 'traced block'])
@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_frozen_parts_are_refused(compiled, mode):
    model = net_around(torch.jit.freeze(COMPILED[compiled]().eval()))
    getattr(model, mode)()
    words = r'model must be without parts.*freeze.*got 2'
    with pytest.raises(ConfigError, match=words):
        GroupFisherPruner(model, interval=1)
