"""Buffers of channel width go along with the channels that they meet."""

import numpy as np
import pytest
import torch
from support.toys import Net, conv, grouped, images, toy_forward, widths
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, masked_and_compact


class Buffers(nn.Module):
    """A module of random buffers and a function of it and x."""

    def __init__(self, run, **shapes):
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            self.register_buffer(name, torch.rand(shape) + 0.5)

    def forward(self, x):
        return self.run(self, x)


def frozen_norm(norm, x):
    """A norm without parameters, as torch runs it."""
    return F.batch_norm(x, norm.mean, norm.var, norm.scale, norm.shift)


def scaled_in_half(norm, x):
    """A scale worked out in another precision before it meets channels."""
    scale = (norm.scale.float() * 2).rsqrt().to(x.dtype)
    return x * scale.view(-1, 1, 1) + norm.shift[:, None, None].type_as(x)


def blur(pool, x):
    return F.conv2d(x, pool.kernel, pool.bias, groups=len(pool.kernel))


def widen(pool, x):
    return F.conv_transpose2d(x, pool.kernel, stride=2, groups=x.shape[1])


def blur_by_taps(pool, x):
    kernel = pool.taps[:, None] * pool.taps
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


NORM = dict.fromkeys(('weight', 'bias', 'running_mean', 'running_var'), 6)
CASES = {
    'FrozenBatchNorm2d': (lambda: FrozenBatchNorm2d(6), tuple(NORM)),
    'batch_norm of buffers': (
        lambda: Buffers(frozen_norm, mean=6, var=6, scale=6, shift=6),
        ('mean', 'var', 'scale', 'shift'),
    ),
    'worked out': (
        lambda: Buffers(scaled_in_half, scale=6, shift=6),
        ('scale', 'shift'),
    ),
    'mask': (lambda: Buffers(lambda m, x: x * m.mask, mask=(1, 6, 1, 1)), ('mask',)),
    'in place': (
        lambda: Buffers(lambda m, x: (x * 1).add_(m.mask), mask=(6, 1, 1)),
        ('mask',),
    ),
    'concatenated': (
        lambda: Buffers(
            lambda m, x: torch.cat([x * m.a, m.b.expand_as(x)], 0)[:2],
            a=(6, 1, 1),
            b=(6, 1, 1),
        ),
        ('a', 'b'),
    ),
    'blur': (lambda: Buffers(blur, kernel=(6, 1, 3, 3), bias=6), ('kernel', 'bias')),
    'blur of two each': (
        lambda: Buffers(
            lambda m, x: F.conv2d(x, m.kernel, groups=x.shape[1]), kernel=(12, 1, 3, 3)
        ),
        ('kernel',),
    ),
    'transposed filter': (lambda: Buffers(widen, kernel=(6, 1, 2, 2)), ('kernel',)),
    'as wide as its taps': (lambda: Buffers(blur_by_taps, taps=3), ()),
    'instance norm': (
        lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        ('running_mean', 'running_var'),
    ),
}


@pytest.mark.parametrize(('make', 'names'), CASES.values(), ids=CASES)
def test_they_go_along(make, names):
    torch.manual_seed(0)
    part = make()
    width = part(torch.rand(2, 6, 8, 8)).shape[1]
    net = Net(
        lambda net, x: net.b(net.part(net.a(x))),
        a=conv(3, 6),
        part=part,
        b=conv(width, 4),
    )
    grouping = grouped(net)
    (group,) = grouping.groups
    assert group.units == 6
    dims = {n: getattr(part, n).shape.index(max(getattr(part, n).shape)) for n in names}
    double = {'b.weight': width // 6} | {
        f'part.{n}': getattr(part, n).shape[dims[n]] // 6 for n in names
    }
    members = [('a.weight', 0), ('a.bias', 0), ('b.weight', 1)]
    members += [(f'part.{n}', d) for n, d in dims.items()]
    assert widths(group) == {(n, d): double.get(n, 1) for n, d in members}

    x, kept = images(), random_units([group], 0.5, np.random.default_rng(0))
    assert disagreement(net, [group], kept, lambda net: net(x)) is None
    _, small = masked_and_compact(net, [group], kept)
    for name, dim in dims.items():
        small_buffer = getattr(small.part, name)
        assert small_buffer.shape[dim] == 3 * double[f'part.{name}']
        assert not small_buffer.requires_grad


def test_those_in_no_state_go_along():
    parts = {'a': conv(3, 6), 'b': conv(6, 4)}
    net = Net(lambda net, x: net.b(net.a(x) * net.scale), **parts)
    scale = torch.linspace(1, 6, 6)[:, None, None]
    net.register_buffer('scale', scale, persistent=False)
    (group,) = grouped(net).groups
    kept = np.array([True, False, True, True, False, True])
    assert disagreement(net, [group], kept, toy_forward) is None
    _, small = masked_and_compact(net, [group], kept)
    assert small.scale.flatten().tolist() == [1, 3, 4, 6]


POSITIONS = {
    'a window over positions': Buffers(lambda m, x: x * m.window, window=8),
    'numbers of positions': Buffers(lambda m, x: x + m.rows[:, None], rows=8),
    'a whole map': Buffers(lambda m, x: x * m.map.mean(), map=(6, 8, 8)),
}


@pytest.mark.parametrize('part', POSITIONS.values(), ids=POSITIONS)
def test_other_buffers_stay(part):
    net = Net(
        lambda net, x: net.b(net.part(net.a(x))), a=conv(3, 6), part=part, b=conv(6, 4)
    )
    (group,) = grouped(net).groups
    assert widths(group) == {('a.weight', 0): 1, ('a.bias', 0): 1, ('b.weight', 1): 1}


def test_images_stay_images():
    """What buffers do to images leaves the first layer the first one."""
    net = Net(
        lambda net, x: net.b(net.a(net.part(x)).relu()),
        a=conv(3, 6),
        part=Buffers(lambda m, x: (x - m.mean) / m.std, mean=(3, 1, 1), std=(3, 1, 1)),
        b=conv(6, 4),
    )
    (group,) = grouped(net).groups
    assert widths(group) == {('a.weight', 0): 1, ('a.bias', 0): 1, ('b.weight', 1): 1}


def test_fixed_channels_keep_their_buffers():
    net = Net(
        lambda net, x: net.b(net.part(net.a(x).softmax(1))),
        a=conv(3, 6),
        part=Buffers(lambda m, x: x * m.mask, mask=(6, 1, 1)),
        b=conv(6, 4),
    )
    assert not grouped(net).groups
