"""Whole models: each refitted layer is what plain least squares gives."""

import copy

import numpy as np
import pytest
import torch
from support.pruning import hooks_on
from support.toys import (
    TOYS,
    ConvPair,
    FlattenLinear,
    Net,
    SharedHead,
    TinyDetector,
    Transposed,
    conv,
    grouped,
    images,
    square_loss,
)
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from mmgfp.compensation import survey as reasons
from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.layer_fit import UNPAIRED
from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.sampling import held_out, sample
from mmgfp.surgery.compact import compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.errors import ConfigError

#: Next to no ridge: plain least squares.
PLAIN = dict(method='least_squares', ridges=(1e-13,), norms='none')


def batches(count=4, size=8):
    return [images(40, size, seed).double() for seed in range(count)]


def loss_calls(count=4, size=8):
    return [lambda m, x=x: square_loss(m(x)) for x in batches(count, size)]


def without(net, gone):
    """Groups of a net and which units are kept, without some units by number."""
    grouping = grouped(net, lambda m: square_loss(m(images(2).double())))
    return grouping, ~np.isin(np.arange(grouping.units), gone)


def run(net, gone=(0,), calls=None, **options):
    grouping, kept = without(net, gone)
    config = CompensationConfig(**options)
    return compensate(net, grouping, kept, calls or loss_calls(), config)


def cut(net, gone):
    grouping, kept = without(net, gone)
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(net))
    return compact(net, structure), structure


def seen_by(model, name, batches, loss=None):
    """Inputs and outputs of a layer over all batches, and gradients by the outputs."""
    calls = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda m, a, y: calls.append((a[0], y)))
    grads = []
    for x in batches:
        first = len(calls)
        outputs = model(x)
        if loss is not None:
            ys = [y for _, y in calls[first:]]
            grads += torch.autograd.grad(loss(outputs), ys)
    handle.remove()
    return [x.detach() for x, _ in calls], [y.detach() for _, y in calls], grads


def unfolded(layer, x):
    """Inputs by position for each conv group, (G, P, n), by `F.unfold`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    if isinstance(layer, nn.ConvTranspose2d):
        return x.movedim(1, -1).reshape(1, -1, x.shape[1])
    options = layer.dilation, 0, layer.stride
    if layer.padding_mode == 'zeros':
        pads, x_padded = layer.padding, x
    else:
        pads = (0, 0)
        both = [p for p in reversed(layer.padding) for _ in range(2)]
        x_padded = F.pad(x, both, layer.padding_mode)
    rows = [
        F.unfold(part, layer.kernel_size, options[0], pads, options[2])
        for part in x_padded.chunk(layer.groups, 1)
    ]
    return torch.stack([r.movedim(1, -1).flatten(0, 1) for r in rows])


def by_position(layer, y):
    """Outputs by position for each conv group, (G, P, o)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, layer.out_features)
    if isinstance(layer, nn.ConvTranspose2d):
        y = y - layer.bias.detach()[:, None, None]
        blocks = y.unfold(2, 2, 2).unfold(3, 2, 2)  # (N, O, H, W, 2, 2)
        return blocks.permute(0, 2, 3, 1, 4, 5).reshape(1, -1, y.shape[1] * 4)
    parts = y.chunk(layer.groups, 1)
    return torch.stack([p.movedim(1, -1).flatten(0, 2) for p in parts])


def matrix_of(layer):
    """Weights, and biases in the last row, (G, n, o)."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.reshape(1, weight.shape[0], -1)
    groups = getattr(layer, 'groups', 1)
    matrix = weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)
    if layer.bias is None:
        return matrix
    return torch.cat([matrix, layer.bias.detach().reshape(groups, 1, -1)], 1)


def system_of(net, model, structure, name, f=None):
    """Inputs that a layer now has, and outputs that it had, (G, P, n) and (G, P, o)."""
    layer = model.get_submodule(name)
    xs, _, _ = seen_by(model, name, batches())
    _, ys, _ = seen_by(net, name, batches())
    dim = int(isinstance(layer, nn.ConvTranspose2d))
    kept = structure.kept.get(f'{name}.weight', {}).get(dim)
    channels = -1 if isinstance(layer, nn.Linear) else 1
    if kept is not None:
        ys = [y.index_select(channels, torch.tensor(kept)) for y in ys]
    x = torch.cat([unfolded(layer, x) for x in xs], 1)
    y = torch.cat([by_position(layer, y) for y in ys], 1)
    if layer.bias is not None and not dim:
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
    if f is not None:
        x, y = (f.sqrt()[..., None] * t for t in (x, y))
    assert (torch.linalg.matrix_rank(x) == x.shape[2]).all()  # one solution only
    return x, y


def plain_solution(*args):
    """The weights that `lstsq` gives a layer for the inputs that it now has."""
    return torch.linalg.lstsq(*system_of(*args)).solution


def chain(*layers, width=6):
    """A net in which the first conv loses channels, and ``layers`` follow."""
    return nn.Sequential(
        conv(3, width, 1), nn.Softplus(), conv(width, width, 1), nn.Softplus(), *layers
    )


class RoIHead(nn.Module):
    """RoIs cut out of features by position, flattened, two FC layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc1 = conv(3, 5), nn.Linear(5 * 4, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x):
        corners = torch.tensor([[0.0, 0, 4, 4], [2, 1, 7, 6], [1, 3, 6, 8]]).to(x)
        rois = [corners + i / 2 for i in range(len(x))]
        pooled = roi_align(F.softplus(self.stem(x)), rois, 2)
        return self.fc2(F.softplus(self.fc1(pooled.flatten(1))))


class NormedConv(nn.Sequential):
    """A conv without a bias, and the norm that reads it."""

    def __init__(self, width, out):
        super().__init__(nn.Conv2d(width, out, 3, bias=False), nn.BatchNorm2d(out))


def last(width, out=6, **options):
    return nn.Conv2d(width, out, 3, **options)


#: Nets, units that go, layers that are refitted in any case, seeds for which they are.
NETS = {
    'stride, padding': (lambda: chain(last(6, stride=2, padding=1)), 2, '2 4'),
    'dilation': (lambda: chain(last(6, dilation=2, bias=False)), 2, '2 4'),
    'reflect': (lambda: chain(last(6, padding=1, padding_mode='reflect')), 2, '2 4'),
    'groups': (lambda: chain(last(6, groups=2), conv(6, 3, 1)), 3, '2 4'),
    'depth-wise': (lambda: chain(last(6, groups=6), conv(6, 3, 1)), 4, '2 4', 1),
    'linear': (lambda: chain(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 3)), 3, '6'),
    'two levels': (SharedHead, 3, 'level1 level2 tower pred'),
    'RoI FC': (RoIHead, 2, 'fc1'),
    'flattened': (FlattenLinear, 2, 'fc1'),
    'transposed': (Transposed, 2, 'up head'),
    'detector': (TinyDetector, 2, 'stage1 lateral1 fpn1 cls_pred'),
}


@pytest.mark.parametrize('name', NETS)
def test_refitted_weights_are_plain_least_squares(name):
    """Each layer's, on what the layers before it give after they were refitted."""
    build, units, layers, *seed = NETS[name]
    torch.manual_seed(*seed or [0])
    net = build().double().eval()
    result = run(net, range(units), **PLAIN)
    _, structure = cut(net, range(units))
    refitted = {r.layer.removesuffix('.weight') for r in result.refitted}
    assert refitted >= set(layers.split())
    for layer in refitted:
        expected = plain_solution(net, result.model, structure, layer)
        weights = matrix_of(result.model.get_submodule(layer))
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def reads(*layers):
    """A net in which ``layers`` read what the first conv loses."""
    return nn.Sequential(conv(3, 6, 1), nn.Softplus(), *layers)


FLAT = nn.AvgPool2d(4), nn.Flatten()
#: Nets, units that go, a layer that is refitted, the most inputs of a block with the
#: bias, if there is one, and the ends of its blocks without it.
BLOCKED = {
    'conv': (lambda: reads(last(6, stride=2)), 2, '2', 13, [12, 24, 36]),
    'no bias': (lambda: reads(last(6, bias=False)), 2, '2', 20, [18, 36]),
    'linear': (lambda: reads(*FLAT, nn.Linear(24, 3)), 2, '4', 7, [6, 11, 16]),
    'groups': (NETS['groups'][0], 3, '4', 15, [14, 27]),
    'two levels': (SharedHead, 2, 'level2', 20, [18, 36]),
    'RoI FC': (RoIHead, 2, 'fc1', 7, [6, 12]),
}


@pytest.mark.parametrize('name', BLOCKED)
def test_many_inputs_are_fitted_in_blocks(name):
    """Each to what the others leave: those before it as refitted, the rest as cut."""
    build, units, layer, size, ends = BLOCKED[name]
    torch.manual_seed(0)
    net = build().double().eval()
    result = run(net, range(units), **PLAIN, max_inputs=size)
    small, structure = cut(net, range(units))
    x, y = system_of(net, result.model, structure, layer)
    weights = matrix_of(small.get_submodule(layer))
    inputs = x.shape[2] - (small.get_submodule(layer).bias is not None)
    assert ends[-1] == inputs
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        block = [*range(start, end), *range(inputs, x.shape[2])]
        others = weights.index_fill(1, torch.tensor(block), 0)
        weights[:, block] = torch.linalg.lstsq(x[..., block], y - x @ others).solution
    found = matrix_of(result.model.get_submodule(layer))
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)


def test_a_norm_takes_back_the_bias_of_all_blocks_once():
    """Blocks and a free bias: as good as one system is for the last block alone."""
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8, 1), nn.Softplus(), NormedConv(8, 4)).double().eval()
    for x in batches():
        net.train()(x)
    net.eval()
    result = run(net, range(3), **{**PLAIN, 'norms': 'others'}, max_inputs=25)
    whole = run(net, range(3), **{**PLAIN, 'norms': 'others'})
    x = torch.cat(batches())
    target = net(x)
    errors = [(m(x) - target).square().mean() for m in (result.model, whole.model)]
    as_cut = (cut(net, range(3))[0](x) - target).square().mean()
    assert errors[1] < errors[0] < as_cut


def test_positions_are_weighted_by_squared_gradients():
    """0.05 + 0.95 of the mean over kept outputs, in units of the first batch's mean."""
    torch.manual_seed(0)
    net = chain(last(6, 5)).double()
    result = run(net, (0, 1), **{**PLAIN, 'method': 'fisher', 'uniform': (0.05,)})
    _, structure = cut(net, (0, 1))
    for layer in ('2', '4'):
        _, _, grads = seen_by(net, layer, batches(), square_loss)
        scale = grads[0].square().mean()
        kept = structure.kept.get(f'{layer}.weight', {}).get(0, slice(None))
        shares = torch.cat([g[:, kept].square().mean(1).flatten() for g in grads])
        f = (0.05 + 0.95 * shares / scale)[None]
        expected = plain_solution(net, result.model, structure, layer, f)
        weights = matrix_of(result.model.get_submodule(layer))
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def test_both_modes_agree_where_only_one_layer_reads_what_is_lost():
    torch.manual_seed(0)
    net = ConvPair().double().eval()
    for method in ('fisher', 'least_squares'):
        weights = [
            run(net, method=method, one_pass=one_pass).model.conv2.weight
            for one_pass in (False, True)
        ]
        assert (weights[0] - cut(net, [0])[0].conv2.weight).abs().max() > 1e-3
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('toy', TOYS)
@pytest.mark.parametrize('one_pass', [False, True])
def test_what_loses_nothing_stays_bit_equal(toy, one_pass):
    torch.manual_seed(0)
    net = toy().double()
    before = copy.deepcopy(net.state_dict())
    flags = [p.requires_grad for p in net.parameters()]
    same = run(net, (), one_pass=one_pass)
    assert same.layers == same.norms == ()
    tensors = same.model.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in before.items())
    # And so does the original, whatever the compact model loses.
    result = run(net, (0,), one_pass=one_pass)
    assert result.refitted and type(result.model) is toy
    tensors = net.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in before.items())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert net.training and all(p.grad is None for p in net.parameters())
    assert result.model.training
    assert hooks_on(net) == hooks_on(result.model) == 0
    # Layers that are not reported are as they were cut.
    reported = {r.layer for r in result.layers}
    small, _ = cut(net, (0,))
    for name, module in small.named_modules():
        is_layer = isinstance(module, nn.Conv2d | nn.Linear)
        if is_layer and f'{name}.weight' not in reported:
            weight = result.model.get_submodule(name).weight
            assert torch.equal(module.weight, weight)


@pytest.mark.parametrize('options', [dict(memory=1), dict(memory=1, one_pass=True)])
def test_little_memory_means_more_passes_to_the_same_end(options):
    torch.manual_seed(0)
    net = TinyDetector().double()
    results = [run(net, **{**options, 'memory': m}) for m in (options['memory'], 2**30)]
    first, second = (r.model.state_dict() for r in results)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-9)


def test_a_sample_of_positions_is_without_bias():
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4
    index, share = sample(weights, 2000, seed=0)
    total = weights.double().sum()
    torch.testing.assert_close((weights[index] / share).sum(), total)
    counts = torch.bincount(index, minlength=1000)
    expected = 2000 * weights.double() / total
    assert ((counts - expected).abs() < 2).all() and counts.max() > 1
    assert torch.equal(index, sample(weights, 2000, seed=0)[0])
    assert not torch.equal(index, sample(weights, 2000, seed=1)[0])
    torch.manual_seed(0)
    net = ConvPair().double().eval()
    options = dict(ridges=(1e-3,), uniform=(0.3,))
    first, second = (run(net, rows=n, **options).layers[0] for n in (300, 10**6))
    assert first.after != second.after
    assert first.after == pytest.approx(second.after, rel=0.2)


class Computed(nn.Conv2d):
    """A convolution with a weight that is computed."""

    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias, padding=self.padding)


def functional():
    return Net(
        lambda n, x: (
            n.head(y := n.stem(x).relu()).sum((2, 3))
            + F.conv2d(y, n.head.weight).sum((2, 3))
        ),
        stem=conv(3, 6),
        head=conv(6, 4, 1),
    )


def tied():
    net = Net(
        lambda n, x: n.first(y := n.stem(x).relu()) + n.second(y),
        stem=conv(3, 6),
        first=conv(6, 4, 1),
        second=conv(6, 4, 1, bias=False),
    )
    net.second.weight = net.first.weight
    return net


def rows_by_value():
    def forward(n, x):
        features = n.stem(x).mean((2, 3))  # (N, 6)
        chosen = features[features.sum(1) > 0]
        return n.head(chosen)

    return Net(forward, stem=conv(3, 6), head=nn.Linear(6, 4))


ALONE = {
    'computed': (
        lambda: nn.Sequential(conv(3, 6), Computed(6, 4, 3)),
        reasons.NOT_LINEAR,
    ),
    'functional': (functional, reasons.ELSEWHERE),
    'tied': (tied, reasons.SHARED),
    'rows': (rows_by_value, UNPAIRED),
    'transposed': (
        lambda: nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 4, 3, 2)),
        'of transposed convolutions',
    ),
}


@pytest.mark.parametrize('name', ALONE)
def test_what_cannot_be_refitted_is_left_alone_with_the_reason(name):
    torch.manual_seed(0)
    build, reason = ALONE[name]
    net = build().double()
    result = run(net, range(3))
    small, _ = cut(net, range(3))
    assert reason in result.layers[0].reason and not result.refitted
    tensors = result.model.state_dict()
    for key, value in small.state_dict().items():
        assert torch.equal(value, tensors[key])


def test_a_layer_whose_inputs_are_not_finite_stays():
    net = nn.Sequential(conv(3, 6, 1), conv(6, 4, 1)).double()
    calls = loss_calls()
    calls[1] = lambda m: square_loss(m(batches()[1] * float('inf')))
    report = run(net, calls=calls).layers[0]
    assert 'not finite' in report.reason and report.ridge is None


def test_bad_arguments():
    net = ConvPair().double()
    with pytest.raises(ConfigError, match='two batches or more'):
        run(net, calls=loss_calls(1))
    with pytest.raises(ConfigError, match='one entry for each of 6 units'):
        compensate(net, grouped(net.float()), np.ones(5, bool), loss_calls())
    with pytest.raises(ConfigError, match="method must be one of .*'bn'"):
        CompensationConfig(method='fischer')
    for options in (dict(uniform=(2,)), dict(held_out=0.0), dict(rows=0)):
        with pytest.raises(ConfigError, match=next(iter(options))):
            CompensationConfig(**options)


def test_some_batches_are_held_out():
    assert sum(held_out(8, 0.25)) == 2
    assert held_out(2, 0.9) == [False, True]
