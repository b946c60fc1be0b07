"""Criteria beside Fisher information, against numbers worked out by hand.

One net has a residual, a depth-wise and a concatenated group; all its kernels are 1 x 1
without bias, so that layers are matrices:

    s = a x,  h = b s,  d = dw h,  r = s + c d,  out = head [r, e x]

Groups are a (made by a and c), b (by b and dw) and e, of two units each.
"""

import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from support.pruning import hooks_on, iterate
from support.toys import (
    Net,
    ResidualPair,
    TinyDetector,
    images,
    matrix,
    square_loss,
    toy_loss,
)
from torch import nn

from mmgfp import ChannelPruner
from mmgfp.criteria.base import CRITERIA
from mmgfp.utils.errors import ConfigError, StatisticsError

NAN = float('nan')
WEIGHTS = dict(type='taylor', of='weights')
SLIMMING = dict(type='bn_scale', sparsity=0.01)
APOZ = dict(type='activation', of='apoz')
#: Those that gather something between decisions.
GATHERING = ['taylor', WEIGHTS, 'activation', APOZ]
WITHOUT = ['l1', 'l2', 'fpgm', 'bn_scale', SLIMMING, 'lamp', 'random']
SPECS = ['fisher', *GATHERING, *WITHOUT]


def norm(*scales):
    layer = nn.BatchNorm2d(len(scales))
    layer.weight.data = torch.tensor(scales)
    return layer


def run(net, x):
    s = net.a(x)
    r = s + net.n1(net.c(net.n2(net.dw(net.b(s)))))
    return net.head(torch.cat([r, net.act(net.e(x))], 1))


def mixed(**parts):
    """The net above; norms and the activation behind e do nothing unless given."""
    layers = dict(
        a=matrix([[1.0], [-2.0]]),
        b=matrix([[1.0, 2.0], [3.0, -4.0]]),
        dw=matrix([[2.0], [-1.0]], groups=2),
        c=matrix([[0.5, 1.0], [-1.0, 2.0]]),
        e=matrix([[3.0], [-1.0]]),
        head=matrix([[1.0, 2.0, -1.0, 1.0]]),
        n1=nn.Identity(),
        n2=nn.Identity(),
        act=nn.Identity(),
    )
    return Net(run, **(layers | parts))


def pixels(*values):
    """One image of one pixel for each value, (N, 1, 1, 1)."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def prepared(criterion, net, x, **options):
    def loss(net):
        return net(x).sum()

    pruner = ChannelPruner(net, criterion=criterion, **{'interval': 10**6} | options)
    pruner.prepare(loss, loss, len(x))
    return pruner, loss


def scores(criterion, net=None, x=(1.0,), count=1):
    """Scores by group after some iterations."""
    pruner, loss = prepared(criterion, net or mixed(), pixels(*x))
    for _ in range(count):
        iterate(pruner, loss)
    names = [g.name for g in pruner.units.grouping.groups]
    values = pruner.criterion.scores().values
    pruner.close()
    assert names == ['a', 'b', 'e']
    return dict(zip(names, values.reshape(3, 2).tolist(), strict=True))


# -- worked out by hand -------------------------------------------------------


@pytest.mark.parametrize(
    ('criterion', 'a', 'b', 'e'),
    [
        # All makers: 1 + (0.5 + 1), 2 + (1 + 2); (1 + 2) + 2, (3 + 4) + 1.
        ('l1', [2.5, 5], [5, 8], [3, 1]),
        # √(1 + 0.25 + 1), √(4 + 1 + 4); √(1 + 4 + 4), √(9 + 16 + 1).
        ('l2', [1.5, 3], [3, 26**0.5], [3, 1]),
        # These squares: 2.25 / (2.25 + 9); 9 / (9 + 26); 1 / (1 + 9).
        ('lamp', [0.2, 1], [9 / 35, 1], [1, 0.1]),
        # Differences (3, 1.5, -1), (-2, 6, 3), 4.
        ('fpgm', [3.5, 3.5], [7, 7], [4, 4]),
    ],
)
def test_magnitudes(criterion, a, b, e):
    expected = dict(a=pytest.approx(a), b=pytest.approx(b), e=pytest.approx(e))
    assert scores(criterion, count=0) == expected


def test_lamp_of_equal_units_takes_the_first_one_first():
    # 4 / 12, 4 / 8, 4 / 4.
    net = Net(lambda n, x: n.f(n.e(x)), e=matrix([[2.0]] * 3), f=matrix([[1.0] * 3]))
    pruner, _ = prepared('lamp', net, pixels(1.0))
    assert pruner.criterion.scores().values == pytest.approx([1 / 3, 0.5, 1])


def test_fpgm_is_the_mean_distance_to_the_units_that_are_left():
    # Points 0, 1 and 4 on a line: (1 + 4) / 2, (1 + 3) / 2, (4 + 3) / 2.
    layers = dict(e=matrix([[0.0], [1.0], [4.0]]), f=matrix([[1.0] * 3]))
    pruner, loss = prepared(
        'fpgm', Net(lambda n, x: n.f(n.e(x)), **layers), pixels(1.0), interval=1
    )
    assert pruner.criterion.scores().values.tolist() == [2.5, 2, 3.5]
    assert iterate(pruner, loss).units.tolist() == [1]
    # What is pruned is gone, masked or cut.
    np.testing.assert_equal(pruner.criterion.scores().values, [4, NAN, 4])
    pruner.compact_()
    np.testing.assert_equal(pruner.criterion.scores().values, [4, NAN, 4])


def test_taylor_of_gates():
    # At x = 1: s = (1, -2), h = (-3, 11), d = (-6, -11), r = (-13, -18).
    # Gradients: r (1, 2), d (-1.5, 5), h (-3, -5), of b's input (-18, 14).
    # a: -18 - 13 and -28 - 36; b: 9 + 9 and -55 - 55; e: -3 and -1. The second image
    # doubles them: (1 + 2)² times the squares, where Fisher has 1² + 2².
    one = dict(a=[31.0**2, 64.0**2], b=[18.0**2, 110.0**2], e=[9.0, 1.0])
    assert scores('taylor') == one
    assert scores('taylor', x=(1.0, 2.0)) == {
        n: [9 * v for v in x] for n, x in one.items()
    }
    assert scores('fisher', x=(1.0, 2.0)) == {
        n: [5 * v for v in x] for n, x in one.items()
    }


def test_taylor_of_weights():
    # a: gradients (-17, 16). c: r's gradient times d. b: h's times s. dw: d's times h.
    # a: 17² + 3² + 11² and 32² + 12² + 44²; b: 3² + 12² + 9², 15² + 40² + 55².
    expected = dict(a=[419, 3104], b=[234, 4850], e=[9, 1])
    assert scores(WEIGHTS) == expected
    assert scores(WEIGHTS, count=3) == {
        n: [3 * v for v in x] for n, x in expected.items()
    }


def test_taylor_of_weights_adds_up_backward_passes_before_the_square():
    pruner, loss = prepared(WEIGHTS, mixed(), pixels(1.0))
    for _ in range(2):
        loss(pruner.model).backward()
    pruner.step()
    assert pruner.criterion.scores().values.tolist() == [
        4 * v for v in (419, 3104, 234, 4850, 9, 1)
    ]
    torch.autograd.grad(loss(pruner.model), pruner.model.a.weight)  # reaches no .grad
    pruner.criterion.reset()
    pruner.step()
    assert np.isnan(pruner.criterion.scores().values).all()


def test_taylor_of_weights_leaves_groups_with_frozen_makers():
    net = mixed()
    net.c.weight.requires_grad = False
    np.testing.assert_equal(
        scores(WEIGHTS, net), dict(a=[NAN] * 2, b=[234, 4850], e=[9, 1])
    )


def test_mean_activation():
    # a is read as s and as r: (1 + 13) / 2, (2 + 18) / 2; b as h and d: (3 + 6) / 2.
    expected = dict(a=[7, 10], b=[4.5, 11], e=[3, 1])
    assert scores('activation') == expected
    # All is linear: means over images 1 and -3, and over iterations.
    doubled = {n: [2 * v for v in x] for n, x in expected.items()}
    assert scores('activation', x=(1.0, -3.0), count=2) == doubled


def test_share_of_activations_that_are_not_zero():
    # e: relu of (3, 6, -3) and of (-1, -2, 1).
    shares = scores(APOZ, mixed(act=nn.ReLU()), x=(1.0, 2.0, -1.0))
    assert shares == dict(a=[1, 1], b=[1, 1], e=pytest.approx([2 / 3, 1 / 3]))


def test_no_zeros_at_all_are_warned_of():
    pruner, loss = prepared(APOZ, mixed(), pixels(1.0))
    iterate(pruner, loss)
    pruner.criterion.scores()
    assert 'tells no units apart' in ' '.join(pruner.criterion.warned)


def test_scales_of_norms(caplog):
    # c's norm is the only one behind a's group, dw's the only one behind b's.
    net = mixed(n1=norm(-0.5, 2.0), n2=norm(3.0, -0.25))
    expected = dict(a=[0.5, 2], b=[3, 0.25], e=[NAN] * 2)
    np.testing.assert_equal(scores('bn_scale', net, x=(1.0, 2.0)), expected)
    pruner, loss = prepared('bn_scale', net, pixels(1.0, 2.0), interval=1)
    with caplog.at_level(logging.WARNING):
        iterate(pruner, loss)
    assert 'group e has no norm with scales' in caplog.text


def test_random_scores_depend_on_the_seed_alone():
    first, again, other = (
        scores(dict(type='random', seed=seed), count=count)
        for seed, count in ((0, 0), (0, 2), (1, 0))
    )
    assert first == again != other


# -- refused ------------------------------------------------------------------


def test_model_without_scales_is_refused():
    with pytest.raises(ConfigError, match='no norm has scales'):
        prepared('bn_scale', mixed(), pixels(1.0))


def test_scales_that_belong_to_no_group_are_refused_at_the_first_decision():
    net = mixed()
    net.run = lambda net, x: net.last(run(net, x))
    net.last = norm(1.0)
    pruner, loss = prepared('bn_scale', net, pixels(1.0, 2.0), interval=1)
    with pytest.raises(StatisticsError, match=r'has no norm with scales.*another crit'):
        iterate(pruner, loss)


@pytest.mark.parametrize(
    'spec',
    [
        dict(type='taylor', of='masks'),
        dict(type='activation', of=['apoz']),
        dict(type='activation', of='max'),
        dict(type='bn_scale', sparsity=-1),
        dict(type='random', seed=-1),
    ],
)
def test_bad_arguments(spec):
    name = list(spec)[1]
    with pytest.raises(ConfigError, match=f'^{name} must be .*got'):
        CRITERIA.build(spec)


@pytest.mark.parametrize('criterion', ['l1', 'activation', WEIGHTS])
def test_auto_needs_scores_that_add_up(criterion):
    with pytest.raises(ConfigError, match='do not add up'):
        ChannelPruner(mixed(), criterion=criterion, units_per_step='auto')
    ChannelPruner(mixed(), criterion='taylor', units_per_step='auto')


# -- the L1 term on scales ----------------------------------------------------


def stepped(optimizer, sparsity=0.5, scaler=None):
    """Scales of both norms after a step, and their gradients without the term."""
    net = mixed(n1=norm(-0.5, 2.0), n2=norm(3.0, -0.25))
    x = pixels(1.0, 2.0, 4.0)
    pruner, loss = prepared(dict(type='bn_scale', sparsity=sparsity), net, x)
    scales = [net.n1.weight, net.n2.weight]
    opt = optimizer(net.parameters())
    value = loss(net)
    (value if scaler is None else scaler.scale(value)).backward()
    grads = [s.grad.clone() / (scaler.get_scale() if scaler else 1) for s in scales]
    opt.step() if scaler is None else scaler.step(opt)
    pruner.step(scaler.get_scale() if scaler else 1.0)
    pruner.close()
    return torch.cat([s.detach() for s in scales]), torch.cat(grads)


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one."""

    def __init__(self, params):
        self.inner = torch.optim.SGD(params, lr=1.0)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()


def sgd(params):
    return torch.optim.SGD(params, lr=1.0)


def fused(params):
    return torch.optim.SGD(params, lr=1.0, fused=True)


@pytest.mark.parametrize(
    ('optimizer', 'scale'), [(sgd, 0), (sgd, 1024), (fused, 1024), (Wrapper, 0)]
)
def test_sparsity_adds_the_subgradient_once(optimizer, scale):
    scaler = torch.amp.GradScaler('cpu', init_scale=scale) if scale else None
    after, grads = stepped(optimizer, scaler=scaler)
    before = torch.tensor([-0.5, 2.0, 3.0, -0.25])
    torch.testing.assert_close(after, before - grads - 0.5 * before.sign())
    untouched, grads = stepped(optimizer, 0, scaler)
    torch.testing.assert_close(untouched, before - grads)


def test_sparsity_ends_with_the_run_and_with_the_pruner():
    net = mixed(n1=norm(-0.5, 2.0), n2=norm(3.0, -0.25))
    pruner, _ = prepared(SLIMMING, net, pixels(1.0, 2.0))
    net.n1.weight.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([net.n1.weight], lr=1.0)
    pruner.close()
    optimizer.step()
    assert net.n1.weight.tolist() == [-0.5, 2]
    pruner, _ = prepared(SLIMMING, net, pixels(1.0, 2.0))
    dropped = weakref.ref(pruner.criterion)
    del pruner
    gc.collect()
    assert dropped() is None
    optimizer.step()
    assert net.n1.weight.tolist() == [-0.5, 2]


def test_sparsity_with_a_closure_is_refused():
    net = mixed(n1=norm(-0.5, 2.0))
    pruner, loss = prepared(SLIMMING, net, pixels(1.0, 2.0))
    loss(net).backward()
    optimizer = torch.optim.LBFGS(net.parameters())
    with pytest.raises(ConfigError, match='closure for LBFGS'):
        optimizer.step(lambda: loss(net))
    pruner.close()


# -- runs ---------------------------------------------------------------------


def trained(criterion):
    """A net with norms wherever the criterion needs them."""
    torch.manual_seed(0)
    kind = ResidualPair if 'bn_scale' in str(criterion) else TinyDetector
    return kind().double()


def pruned(criterion, cut=(), resume=(), iterations=8, scale=1.0, bad=(), **options):
    """The units that each decision takes, and the pruner.

    Args:
        criterion: The criterion.
        cut: Iterations after which pruned units are cut out of the model.
        resume: Iterations after which a new pruner goes on with the state.
        iterations: Iterations.
        scale: A factor on the loss.
        bad: Iterations in which the loss is not finite.
        options: Options of the pruner.
    """

    def build(net):
        return ChannelPruner(
            net,
            criterion=criterion,
            **{'interval': 2, 'units_per_step': 2, 'target': {'flops': 0.12}} | options,
        )

    net, taken = trained(criterion), []
    pruner = build(net)
    pruner.prepare(toy_loss, toy_loss, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for i in range(1, iterations + 1):
        x = images(2, seed=i).double()
        factor = float('inf') if i in bad else scale
        (square_loss(net(x)) * factor).backward()
        for p in net.parameters():
            p.grad = None if p.grad is None else p.grad / factor
        if i not in bad:
            optimizer.step()
        optimizer.zero_grad()
        step = pruner.step(scale)
        if step is not None:
            taken.append(step.units.tolist())
        if i in cut:
            pruner.compact_([optimizer])
        if i in resume:
            state, weights = pruner.state_dict(), net.state_dict()
            pruner.close()
            net = trained(criterion)
            pruner = build(net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
            pruner.load_state_dict(state, [optimizer])
            net.load_state_dict(weights)
    pruner.close()
    return taken, pruner


@pytest.mark.parametrize('criterion', SPECS, ids=str)
def test_decisions_do_not_depend_on_cuts_resumes_and_the_scale_of_the_loss(criterion):
    taken, pruner = pruned(criterion)
    assert [len(units) for units in taken] == [2] * 4
    assert hooks_on(pruner.model) == 0
    assert pruned(criterion, cut=(2, 6))[0] == taken
    assert pruned(criterion, resume=(3, 4))[0] == taken
    assert pruned(criterion, cut=(4,), resume=(5,))[0] == taken
    assert pruned(criterion, scale=1024.0)[0] == taken


@pytest.mark.parametrize('criterion', GATHERING, ids=str)
def test_only_iterations_that_are_watched_count(criterion):
    _, pruner = pruned(criterion, iterations=4, interval=9, statistics_interval=2)
    assert set(pruner.criterion.statistics.seen.tolist()) == {2}


@pytest.mark.parametrize('criterion', GATHERING[:2], ids=str)
def test_gradients_that_are_not_finite_do_not_count(criterion):
    _, pruner = pruned(criterion, iterations=3, interval=9, bad=(2,))
    gathered = pruner.criterion.scores()
    assert (gathered.nonfinite, gathered.nonfinite_in_row) == (1, 0)
    assert np.isfinite(gathered.values).all()


@pytest.mark.parametrize('criterion', GATHERING, ids=str)
def test_processes_decide_by_the_mean_over_their_batches(criterion):
    values, parts = [], []
    for x in ((1.0, 2.0), (-1.0, 3.0), (1.0, 2.0, -1.0, 3.0)):
        net = mixed(act=nn.ReLU())
        pruner, loss = prepared(criterion, net, pixels(*x))
        iterate(pruner, loss)
        values.append(pruner.criterion.scores().values)
        parts.append(pruner.criterion)

    def reduce(flat):
        flat += parts[1].statistics._flat
        return 2

    joint = parts[0].scores(reduce).values
    assert joint == pytest.approx((values[0] + values[1]) / 2)
    if 'activation' in str(criterion):  # means over the images of all
        assert joint == pytest.approx(values[2])
    parts[0].gather(reduce, keep=True)  # sums of both, for the one process that saves
    assert parts[0].statistics.seen.tolist() == [2, 2, 2]


def test_weights_that_are_not_finite_leave_a_group_alone(caplog):
    pruner, loss = prepared('l1', mixed(), pixels(1.0), interval=1)
    pruner.model.e.weight.data[:] = float('nan')
    with caplog.at_level(logging.WARNING):
        (unit,) = iterate(pruner, loss).units
    assert unit < 4
    assert 'group e has weights that are not finite and is left alone' in caplog.text
