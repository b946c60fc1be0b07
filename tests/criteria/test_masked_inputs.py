"""Scores of pruned units against explicit masks at zero, and against hand-made numbers.

The reference multiplies masks onto the inputs of a model with all of its weights; the
package knows the gradients from a masked model and the columns that it has kept aside.
"""

import copy

import numpy as np
import pytest
import torch
from support.reference import mask_fisher
from support.toys import TOYS, Net, conv, images, matrix, square_loss, toy_loss
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmgfp import ChannelPruner
from mmgfp.criteria.masked_inputs import input_gradient


def half_pruned(model, loss=toy_loss, count=2, seed=0, **options):
    """A pruner of which some units of each group are pruned by hand."""
    options = {'interval': 10**6, 'recover': True, **options}
    pruner = ChannelPruner(model, **options)
    pruner.prepare(loss, loss, count)
    rng = np.random.default_rng(seed)
    units = pruner.units
    gone = [
        rng.permutation(np.flatnonzero(units.group_of == g))[: max(n // 2, 1)]
        for g, n in enumerate(units.sizes)
        if n > 1
    ]
    units.prune(np.concatenate(gone))
    return pruner


def score(pruner, loss=toy_loss):
    """The scores after one iteration."""
    pruner.model.zero_grad()
    loss(pruner.model).backward()
    pruner.step()
    return pruner.criterion.scores().values


def assert_equals_masks(model, loss=toy_loss, count=2):
    whole = copy.deepcopy(model)
    pruner = half_pruned(model, loss, count)
    kept, groups = pruner.units.kept, pruner.units.grouping.groups
    expected = mask_fisher(whole, loss, groups, count, kept=kept).double().numpy()
    found = score(pruner, loss)
    assert (expected[~kept] > 0).any() and (found[~kept] > 0).any()
    group_of = pruner.units.group_of
    for g in range(len(groups)):
        if not expected[group_of == g].any():  # without a gradient, nothing is known
            assert np.isnan(found[group_of == g]).all()
    found = np.where(np.isnan(found) & (expected == 0), 0, found)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-9 * expected.max())


def test_conv_pair_by_hand():
    """A = [1, 2] and [2, 4]; y = 3 a, b's column of -1 is gone; the loss is Σ y².

    dL/dy = 2 y = [6, 12]. At mask 0 the second unit has Σ A · (-1) · dL/dy
    = -(2·6 + 4·12) = -60; the first one at mask 1 has 3 · (1·6 + 2·12) = 90.
    """
    layers = dict(a=matrix([[1.0], [2.0]]), b=matrix([[3.0, -1]]))
    net = Net(lambda n, x: n.b(n.a(x)), **layers)
    x = torch.tensor([1.0, 2.0]).reshape(1, 1, 1, 2)
    pruner = ChannelPruner(net, interval=10, recover=True)

    def loss(model):
        return model(x).square().sum()

    pruner.prepare(loss, loss, 1)
    pruner.units.prune(np.array([1]))
    assert net.b.weight.flatten().tolist() == [3, 0]
    assert score(pruner, loss).tolist() == [90**2, 60**2]


@pytest.mark.parametrize('toy', TOYS)
def test_toys_equal_masks_at_zero(toy):
    torch.manual_seed(0)
    assert_equals_masks(toy().double(), lambda m: toy_loss(m, 3), 3)


PADDED = {
    'stride': dict(stride=2),
    'dilation': dict(dilation=2, padding=2),
    'reflect': dict(padding=1, padding_mode='reflect'),
    'replicate': dict(padding=2, padding_mode='replicate', stride=2),
    'same': dict(padding='same', kernel_size=4),
}


@pytest.mark.parametrize('options', PADDED.values(), ids=PADDED)
def test_kinds_of_convolutions(options):
    torch.manual_seed(0)
    options = {'kernel_size': 3, **options}
    layers = dict(stem=conv(3, 6), mid=nn.Conv2d(6, 5, **options), head=conv(5, 2))
    net = Net(lambda n, x: n.head(n.mid(n.stem(x).relu()).relu()), **layers)
    assert_equals_masks(net.double())


def test_transposed_convolution_with_output_padding():
    """With an output padding of the stride, which the dilation allows."""
    torch.manual_seed(0)
    options = dict(stride=2, padding=1, dilation=3, output_padding=2)
    layer = nn.ConvTranspose2d(4, 6, 3, **options).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    entries = torch.tensor([1, 3])
    found = input_gradient(layer, grad, layer.weight[entries], x.shape)
    torch.testing.assert_close(found, expected[:, entries])


def test_linear_on_sequences_and_in_place_activations():
    """Layers read (N, L, C) and their outputs are changed in place."""
    torch.manual_seed(0)
    layers = dict(a=conv(3, 6, 1), b=nn.Linear(6, 5), c=nn.Linear(5, 2))

    def run(net, x):
        x = F.relu_(net.a(x)).flatten(2).transpose(1, 2)
        return net.c(F.relu_(net.b(x)))

    assert_equals_masks(Net(run, **layers).double())


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_changes_nothing(reentrant):
    found = []
    for is_on in (False, True):
        torch.manual_seed(0)
        layers = dict(stem=conv(3, 6), mid=conv(6, 5), head=conv(5, 2))

        def run(net, x, is_on=is_on):
            def part(y):
                return net.mid(y).relu()

            x = net.stem(x).relu()
            y = checkpoint(part, x, use_reentrant=reentrant) if is_on else part(x)
            return net.head(y)

        found.append(score(half_pruned(Net(run, **layers).double())))
    np.testing.assert_allclose(*found, 1e-9)


def test_two_backward_passes_over_one_graph_add_up():
    torch.manual_seed(0)
    layers = dict(stem=conv(3, 6), head=conv(6, 2))
    net = Net(lambda n, x: n.head(n.stem(x).relu()), **layers).double()
    pruner = half_pruned(net)
    once = score(pruner)
    pruner.criterion.reset()
    loss = toy_loss(net)
    loss.backward(retain_graph=True)
    loss.backward()
    pruner.step()
    # Twice the gradient, four times its square.
    np.testing.assert_allclose(pruner.criterion.scores().values, 4 * once)


def test_gradients_go_on_as_without():
    """What the layers before get, and what the optimizer does, stays the same."""
    torch.manual_seed(0)
    net = TOYS[-1]()
    plain = copy.deepcopy(net)
    grads = []
    for model, recover in ((net, True), (plain, False)):
        pruner = half_pruned(model, recover=recover)
        score(pruner)
        grads.append([p.grad for p in model.parameters()])
    assert any((g == 0).any() for g in grads[0])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_taylor_squares_the_batch():
    """The gate's gradient of a batch is Σ w · dL/dw with the column kept aside."""
    torch.manual_seed(0)
    net = Net(lambda n, x: n.head(n.stem(x).relu()), stem=conv(3, 6), head=conv(6, 2))
    whole = copy.deepcopy(net.double())
    pruner = half_pruned(net, criterion='taylor')
    kept = torch.from_numpy(pruner.units.kept)
    masked = copy.deepcopy(whole)
    masked.head.weight.data[:, ~kept] = 0
    toy_loss(masked).backward()
    # What the optimizer does not see: the gradient of zeroed columns.
    products = (whole.head.weight * masked.head.weight.grad).sum((0, 2, 3))
    expected = products.square().detach().numpy()
    np.testing.assert_allclose(score(pruner), expected, 1e-9)


class Doubled(nn.Conv2d):
    """A layer of a class of its own, whose columns do not tell what it reads."""

    def forward(self, x):
        return super().forward(x) * 2


def test_readers_of_other_kinds_give_no_score():
    torch.manual_seed(0)
    layers = dict(stem=conv(3, 6), head=Doubled(6, 2, 1))
    net = Net(lambda n, x: n.head(n.stem(x).relu()), **layers)
    pruner = half_pruned(net)
    values, kept = score(pruner), pruner.units.kept
    assert np.isnan(values[~kept]).all() and np.isfinite(values[kept]).all()


def test_gradient_penalties_do_not_count():
    torch.manual_seed(0)
    net = Net(lambda n, x: n.head(n.stem(x).relu()), stem=conv(3, 6), head=conv(6, 2))
    pruner = half_pruned(net)
    x = images(2).requires_grad_()
    (grad,) = torch.autograd.grad(square_loss(net(x)), x, create_graph=True)
    grad.square().sum().backward()
    pruner.step()
    assert any('used in a loss' in w for w in pruner.criterion.warned)
    assert np.isnan(pruner.criterion.scores().values).all()


@pytest.mark.parametrize('criterion', ['l1', 'l2', 'fpgm', 'lamp', 'activation'])
def test_weights_and_activations_of_pruned_units_count_as_before(criterion):
    """Nothing that makes units is masked in a pair of layers."""
    torch.manual_seed(0)
    net = Net(lambda n, x: n.head(n.stem(x).relu()), stem=conv(3, 6), head=conv(6, 2))
    pruner = ChannelPruner(net, criterion=criterion, interval=10**6, recover=True)
    pruner.prepare(toy_loss, toy_loss, 2)
    before = score(pruner)
    pruner.criterion.reset()
    pruner.units.prune(np.array([1, 4]))
    np.testing.assert_allclose(score(pruner), before, 1e-6)
