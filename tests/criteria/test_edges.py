"""Unusual models and loops: measured rightly, or left alone with the reason."""

import copy
import io

import pytest
import torch
from support.reference import weight_fisher
from support.toys import Net, conv
from torch import nn
from torch.nn import functional as F

from mmgfp import GroupFisherPruner
from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.errors import TraceError

NEVER = 10**6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def chain(run=lambda n, x: n.c(n.b(n.a(x).relu()).relu()), **layers):
    layers = {'a': conv(3, 6), 'b': conv(6, 8), 'c': conv(8, 2, 1), **layers}
    return Net(run, **layers).double()


def images(count=6):
    return torch.randn(count, 3, 6, 6, dtype=torch.float64)


def each(outputs):
    """The loss of each image."""
    return outputs.square().flatten(1).sum(1)


def watched(net, x, count=None, profiles=None):
    pruner = GroupFisherPruner(net, interval=NEVER)
    count = len(x) if count is None else count
    pruner.prepare(lambda m: each(m(x)).sum(), lambda m: m(x), count, profiles)
    return pruner


def assert_counted(pruner, losses):
    """The sums are those of weights; at least one group has some."""
    pruner.step()
    found = torch.from_numpy(pruner.criterion.statistics.importance.copy())
    pruner.close()
    expected = weight_fisher(pruner.model, losses, pruner.units.grouping.groups)
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def reasons(pruner):
    return {f.layer: f.reason for f in pruner.units.grouping.frozen}


# -- several forward passes before a step ----------------------------------------


def one_by_one(losses):
    for loss in losses:
        loss().backward()


def all_forward_first(losses):
    for loss in [loss() for loss in losses]:
        loss.backward()


def jointly(losses):
    sum(loss() for loss in losses).backward()


@pytest.mark.parametrize('parts', [[6], [3, 3], [4, 2], [1, 2, 3]])
@pytest.mark.parametrize('how', [one_by_one, all_forward_first, jointly])
def test_further_forward_passes_bring_further_images(parts, how):
    net, x = chain(), images()
    pruner = watched(net, x)
    how([lambda p=p: each(net(p)).sum() for p in x.split(parts)])
    assert_counted(pruner, lambda m: each(m(x)))


def test_parts_of_a_model_that_is_never_called_whole():
    net, x = chain(), images()

    def losses(m, x=x):
        return each(m.c(m.b(m.a(x).relu()).relu()))

    pruner = GroupFisherPruner(net, interval=NEVER)
    pruner.prepare(lambda m: losses(m).sum(), lambda m: m(x), 6)
    one_by_one([lambda p=p: losses(net, p).sum() for p in x.split([4, 2])])
    assert_counted(pruner, losses)


def test_calls_with_the_same_images_add_up():
    net, x = chain(), images()

    def losses(m):
        return each(m(x)) + 2 * each(m(x.flip(-1) * 0.5))

    pruner = GroupFisherPruner(net, interval=NEVER)
    pruner.prepare(lambda m: losses(m).sum(), lambda m: m(x), 6)
    losses(net).sum().backward()
    assert_counted(pruner, losses)


# -- rows that are no images -----------------------------------------------------


def frames(n, x):  # (N, T, C, H, W)
    y = n.b(n.a(x.flatten(0, 1)).relu()).relu()
    return n.c(y).unflatten(0, x.shape[:2])


def views(n, x):  # all first frames, then all second ones
    y = n.c(n.b(n.a(torch.cat([*x.unbind(1)])).relu()).relu())
    return torch.stack(y.chunk(x.shape[1]), 1)


def points(n, x):
    y = n.a(x.reshape(-1, 3)).relu()
    return n.c(n.b(y).relu()).view(len(x), -1, 2)


def bare(n, x):
    return n.c(n.b(n.a(x)))


def loop(n, x):
    return torch.cat([n.c(n.b(n.a(part).relu()).relu()) for part in x.split(2)])


LINEAR = {'a': nn.Linear(3, 6), 'b': nn.Linear(6, 8), 'c': nn.Linear(8, 2)}


@pytest.mark.parametrize(
    'run, shape, layers',
    [
        (frames, (4, 3, 3, 6, 6), {}),
        (views, (4, 2, 3, 6, 6), {}),
        (points, (4, 5, 3), LINEAR),
        (loop, (4, 3, 6, 6), {}),
    ],
)
def test_rows_of_an_image_are_summed_before_the_square(run, shape, layers):
    net, x = chain(run, **copy.deepcopy(layers)), torch.randn(shape).double()
    pruner = watched(net, x)
    x = torch.randn(3, *shape[1:]).double()  # another number of images
    each(net(x)).sum().backward()
    assert_counted(pruner, lambda m: each(m(x)))


@pytest.mark.parametrize(
    'shape, count, said',
    [
        ((5, 2, 3), 2, 'a reads 5 rows for 2 images'),  # (L, N, C)
        ((6, 3), 3, 'a reads 6 rows for 3 images'),  # joined by whoever calls it
        ((1, 4, 3), 4, 'a reads 1 rows for 4 images'),
    ],
)
def test_an_unknown_order_is_refused(shape, count, said):
    net = chain(lambda n, x: n.c(n.b(n.a(x).relu()).relu()), **copy.deepcopy(LINEAR))
    with pytest.raises(TraceError, match=f'rows cannot be told to images: {said}'):
        watched(net, torch.randn(shape).double(), count)


# -- what is measured and what is read -------------------------------------------


class Squaring(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.square())


class Residual(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x


class Inverting(nn.Conv2d):
    def forward(self, x):
        return super().forward(1 - x)


class Wrapper(nn.Module):
    """Shows the weight of the layer in it as its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x.square())


class Scaled(nn.Module):
    """Reads through a function, with a weight that is computed."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 1, 1))

    def forward(self, input):  # noqa: A002
        return F.conv2d(input, self.weight * 0.5)


def twice(n, x):
    y = n.b(n.a(x).relu()).relu()
    return n.c(y) + F.conv2d(y.square(), n.c.weight)


def transposed(n, x):
    """Decodes with the weight of an encoder."""
    y = n.b(n.a(x).relu()).relu()
    return F.conv_transpose2d(n.c(y), n.c.weight)


class OnTop(nn.Module):
    """A weight of the model itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 8)
        self.weight = nn.Parameter(torch.randn(2, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(self.b(self.a(x).relu()).relu(), self.weight)


class Squashing(nn.Linear):
    def forward(self, x):
        return super().forward(x.sigmoid())


class Inside(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.silu(x, inplace=True))


class FunctionalLinear(Scaled):
    """The same on tokens; no linear layer by its class."""

    def forward(self, x):
        weight = self.weight[..., 0, 0] / 3
        return F.linear(x.flatten(2).mT, weight).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    'make',
    [
        lambda: chain(c=Squaring(8, 2, 1)),
        lambda: chain(b=Residual(6, 6, 1), c=conv(6, 2)),
        lambda: chain(c=Inverting(8, 2, 1)),
        lambda: chain(c=Wrapper(conv(8, 2, 1))),
        lambda: chain(c=Scaled(8, 2)),
        lambda: chain(c=FunctionalLinear(8, 2)),
        lambda: chain(loop, b=Inverting(6, 8, 1), c=Squaring(8, 2, 1)),
        lambda: chain(
            lambda n, x: n.c(n.b(n.a(x))), b=Inside(6, 8, 1), c=Inside(8, 2, 1)
        ),
        OnTop,
    ],
)
@pytest.mark.parametrize('parts', [[6], [4, 2]])
def test_a_weight_is_counted_where_it_reads(make, parts):
    net, x = make().double(), images()
    pruner = watched(net, x)
    assert set(reasons(pruner)) <= {'c', 'c.layer', ''}  # the outputs
    one_by_one([lambda p=p: each(net(p)).sum() for p in x.split(parts)])
    assert_counted(pruner, lambda m: each(m(x)))


def test_a_linear_layer_that_changes_its_tokens_is_counted():
    layers = {'a': nn.Linear(3, 6), 'b': Squashing(6, 8), 'c': Squashing(8, 2)}
    net, x = chain(**layers), torch.randn(4, 5, 3).double()
    pruner = watched(net, x)
    each(net(x)).sum().backward()
    assert_counted(pruner, lambda m: each(m(x)))


@pytest.mark.parametrize('run', [twice, transposed])
def test_a_weight_that_is_read_elsewhere_is_left_alone(run):
    net, x = chain(run), images()
    pruner = watched(net, x)
    assert 'also read outside of its own calls' in reasons(pruner)['b']
    each(net(x)).sum().backward()
    assert_counted(pruner, lambda m: each(m(x)))


# -- other gradients -------------------------------------------------------------


def smooth():
    return chain(lambda n, x: n.c(F.silu(n.b(F.silu(n.a(x))))))


def penalised(m, x):
    z = x.clone().requires_grad_()
    outputs = m(z)
    (slope,) = torch.autograd.grad(outputs.sum(), z, create_graph=True)
    return each(outputs) + 0.1 * each(slope)


def test_a_gradient_penalty_counts_with_all_that_reaches_the_weights():
    net, x = smooth(), images()
    pruner = watched(net, x)
    penalised(net, x).sum().backward()
    assert not any(g.requires_grad for g in pruner.criterion.tap.gradients.values())
    assert_counted(pruner, lambda m: penalised(m, x))


def ask_for_the_input(loss, net, z):
    torch.autograd.grad(loss, z, retain_graph=True)


def ask_for_weights(loss, net, z):
    torch.autograd.grad(loss, [net.a.weight, net.c.weight, z], retain_graph=True)


def keep_the_graph(loss, net, z):
    torch.autograd.grad(loss, z, retain_graph=True, create_graph=True)


def only_the_input(loss, net, z):
    loss.backward(inputs=[z], retain_graph=True)


@pytest.mark.parametrize(
    'ask', [ask_for_the_input, ask_for_weights, keep_the_graph, only_the_input]
)
def test_gradients_that_no_parameter_gets_do_not_count(ask):
    net, x = smooth(), images()
    pruner, z = watched(net, x), x.clone().requires_grad_()
    loss = each(net(z)).sum()
    ask(loss, net, z)
    loss.backward()
    assert_counted(pruner, lambda m: each(m(x)))


def test_further_losses_of_the_same_forward_pass_add_up():
    net, x = smooth(), images()
    pruner = watched(net, x)
    outputs = net(x)
    each(outputs).sum().backward(retain_graph=True)
    outputs.sum().backward()
    assert_counted(
        pruner, lambda m: (o := m(x)) is not None and each(o) + o.sum((1, 2, 3))
    )


def test_functional_transforms_run_and_do_not_count():
    net, x = smooth(), images()
    pruner = watched(net, x)
    weights = dict(net.named_parameters())
    torch.func.grad(lambda p: each(torch.func.functional_call(net, p, x)).sum())(
        weights
    )
    assert pruner.criterion.tap.take() == {}


# -- what works without mmgfp ----------------------------------------------------


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, saved])
def test_a_copy_feeds_nothing(copied):
    net, x = OnTop().double(), images()
    pruner = watched(net, x)
    other = copied(net)
    each(other(x)).sum().backward()
    assert pruner.criterion.tap.take() == {}
    assert torch.equal(other(x), net(x))
    each(net(x)).sum().backward()
    assert_counted(pruner, lambda m: each(m(x)))


def in_place_inside():
    return chain(bare, b=Inside(6, 8, 1), c=Inside(8, 2, 1))


def in_place_afterwards():
    """Possible where the layer does not need its input in backward."""

    def run(n, x):
        y = n.a(x.mean((2, 3)))
        z = n.c(n.b(y).relu())
        return z + y.mul_(2).sum(1, keepdim=True)

    net = chain(run, **copy.deepcopy(LINEAR))
    net.b.requires_grad_(False)
    return net


#: The work of layers is no matter here.
PROFILES = {f'{n}.weight': LayerProfile(1.0, 1.0) for n in 'abc'}


def by_name():
    return chain(lambda n, x: n.c(input=n.b(input=n.a(input=x).relu()).relu()))


@pytest.mark.parametrize('make', [in_place_inside, in_place_afterwards, by_name])
@pytest.mark.parametrize('count', [1, 3])
def test_training_is_the_same_as_without(make, count):
    plain = make()
    net, x = copy.deepcopy(plain), images(count)
    try:
        watched(net, images(), profiles=PROFILES)
    except TraceError as error:
        assert 'changes its input in place' in str(error)
    for model in (plain, net):
        each(model(x)).sum().backward()
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize('count', [1, 6])
def test_named_arguments_and_single_images_count(count):
    net, x = by_name(), images(count)
    pruner = watched(net, images(), profiles=PROFILES)
    each(net(x)).sum().backward()
    assert_counted(pruner, lambda m: each(m(x)))
