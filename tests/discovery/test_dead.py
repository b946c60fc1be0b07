"""Branches that nothing reads, and those that something reads after all."""

import pytest
import torch
from support.toys import Net, conv, images, toy_forward, toy_loss
from torch import nn
from torch.nn import functional as F

from mmgfp.discovery.dead import find_dead_branches

IN_TRAINING = 'not called in training and in inference'
DIFFERS = 'without it, outputs differ'
FAILS = 'without it, RuntimeError'


def net_of(run):
    parts = dict(stem=conv(3, 4), side=conv(4, 2), head=conv(4, 2))
    side2 = nn.Sequential(conv(2, 3), nn.BatchNorm2d(3), nn.Sequential(conv(3, 1)))
    return Net(run, **parts, side2=side2)


def unread(n, x):
    """Compute two branches, of which the second reads the first, for nothing."""
    x = n.stem(x).relu()
    n.side2(n.side(x))
    return n.head(x)


def test_branches_that_nothing_reads():
    net = net_of(unread)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    dead = find_dead_branches(net, toy_loss, toy_forward)
    assert dead.names == ('side', 'side2')  # the outer module, not its parts
    assert dead.reasons == {}
    assert net.training
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def reader(read):
    """A network that goes on with ``read(net, x, side)``."""

    def run(n, x):
        x = n.stem(x).relu()
        return read(n, x, n.side(x))

    return run


@pytest.mark.parametrize(
    ('read', 'reasons'),
    [
        # what is read without a gradient, or in one of the modes
        (lambda n, x, s: n.head(x) + s.detach(), {'side': FAILS}),
        (lambda n, x, s: n.head(x) + (0 if n.training else s), {'side': FAILS}),
        (lambda n, x, s: n.head(x * (1 + s.shape[1])), {'side': DIFFERS}),
        # zero is a gradient: an optimizer would decay these weights
        (lambda n, x, s: n.head(x) + s.sum() * 0, {}),
        (lambda n, x, s: n.head(x) + s, {}),
    ],
)
def test_branches_that_something_reads(read, reasons):
    dead = find_dead_branches(net_of(reader(read)), toy_loss, toy_forward)
    never = {'side2': f'it, or a part of it, is {IN_TRAINING}'}
    assert dead.names == ()
    expected = reasons | never
    assert dead.reasons.keys() == expected.keys()
    assert all(dead.reasons[n].startswith(r) for n, r in expected.items())


def test_a_module_that_takes_more_than_a_tensor_stays():
    class Scaled(nn.Conv2d):
        def forward(self, x, scale):
            return super().forward(x) * scale

    net = net_of(reader(lambda n, x, s: n.head(x)))
    net.side = Scaled(4, 2, 1)
    net.run = lambda n, x: (n.side(n.stem(x), 2), n.head(n.stem(x)))[1]
    dead = find_dead_branches(net, toy_loss, toy_forward)
    assert dead.names == ()
    assert dead.reasons['side'].startswith('without it, TypeError')


def test_random_numbers_that_a_branch_draws_count():
    """Without it, what comes later would draw others."""

    def run(n, x):
        x = n.stem(x).relu()
        n.side(x)
        return n.head(F.dropout(x, 0.5, n.training))

    class Noisy(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * torch.rand(1)

    net = net_of(run)
    net.side = Noisy(4, 2, 1)
    dead = find_dead_branches(net, toy_loss, toy_forward)
    assert dead.names == () and dead.reasons['side'] == DIFFERS


def test_a_net_without_any_is_not_looked_into():
    net = Net(lambda n, x: n.a(x), a=conv(3, 2))
    calls = []

    def forward(model):
        calls.append(model)
        return model(images())

    assert find_dead_branches(net, toy_loss, forward).names == ()
    assert not calls
