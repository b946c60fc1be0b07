"""Fisher information against numbers worked out by hand, and against masks.

In the hand-made networks all kernels are 1 x 1 and have no bias, so a layer is a
matrix. With A the input of a layer, the gradient of a unit's mask is Σ A · dL/dA.
"""

import gc

import pytest
import torch
from mmengine.config import Config
from support.pruning import importance_of, iterate, prepared, seen_by
from support.reference import mask_fisher
from support.tooling import ROOT
from support.toys import (
    TOYS,
    ConvPair,
    Net,
    ResidualPair,
    images,
    matrix,
    square_loss,
    toy_forward,
    toy_loss,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from mmgfp import GroupFisherPruner
from mmgfp.criteria import mask_gradients
from mmgfp.criteria import tap as taps
from mmgfp.criteria.mask_gradients import mask_gradient, unit_gradients
from mmgfp.criteria.tap import MaskGradientTap
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.tracing.rows import Rows
from mmgfp.utils.errors import ConfigError


def importance(net, x, loss):
    """Importance of all units by group name after one iteration."""

    def compute(net):
        return loss(net(x))

    pruner = prepared(net, compute, count=len(x))
    iterate(pruner, compute)
    pruner.close()
    groups = pruner.units.grouping.groups
    parts = torch.from_numpy(importance_of(pruner)).split([g.units for g in groups])
    return {g.name: part.tolist() for g, part in zip(groups, parts, strict=True)}


def image(*pixels):
    """An image with one channel and one row, (1, 1, 1, W)."""
    return torch.tensor(pixels).reshape(1, 1, 1, -1)


# -- worked out by hand -------------------------------------------------------


def pair():
    layers = dict(a=matrix([[1.0], [2.0]]), b=matrix([[3.0, -1]]))
    return Net(lambda n, x: n.b(n.a(x)), **layers)


def test_conv_pair():
    # A = [1, 2] and [2, 4]; dL/dA = 3 and -1 everywhere:
    # (3·1 + 3·2)² = 81, (-1·2 - 1·4)² = 36.
    assert importance(pair(), image(1.0, 2.0), torch.sum) == {'a': [81, 36]}


def test_images_are_squared_one_by_one():
    # The second image is the first one times -1: its mask gradients are -9 and 6.
    # 81 + 81 and 36 + 36; squaring the sum would give 0.
    x = torch.cat([image(1.0, 2.0), image(-1.0, -2.0)])
    assert importance(pair(), x, torch.sum) == {'a': [162, 72]}


def test_shared_head_sums_calls_before_the_square():
    # The head reads A1 = [1, 2] · (1, 2) and, weighted by -2 in the loss,
    # A2 = [1] · (1, 2). Calls: 3·(1 + 2) = 9 and -2·3·1 = -6; -1·2·(1 + 2) = -6 and
    # -2·-1·2 = 4. (9 - 6)² = 9, (-6 + 4)² = 4.
    net = pair()
    net.run = lambda n, x: (n.b(n.a(x)), n.b(n.a(x[..., :1])))

    def loss(outputs):
        return outputs[0].sum() - 2 * outputs[1].sum()

    assert importance(net, image(1.0, 2.0), loss) == {'a': [9, 4]}


def test_residual_pair_sums_layers_before_the_square():
    # s = a(x) + b(x) = [1 + 3, 2 + 1] · x = (4, 3) at x = 1, read by c and d.
    # c: 1·4, 2·3; d: -3·4, 1·3. (4 - 12)² = 64, (6 + 3)² = 81.
    net = Net(
        lambda n, x: n.c(n.a(x) + n.b(x)) + n.d(n.a(x) + n.b(x)),
        a=matrix([[1.0], [2.0]]),
        b=matrix([[3.0], [1.0]]),
        c=matrix([[1.0, 2.0]]),
        d=matrix([[-3.0, 1.0]]),
    )
    assert importance(net, image(1.0), torch.sum) == {'a': [64, 81]}


def test_depth_wise_inputs_and_outputs_are_copies():
    # a = (1, 2), dw = (2·1, -1·2), b reads dw² = (4, 4) with (5, 1).
    # Input of b: 5·4 = 20 and 1·4 = 4. Input of dw: dL/da = 5·2·(2·1)·2 = 40 and
    # 1·2·(-1·2)·-1 = 4, times a: 40 and 8. (20 + 40)² = 3600, (4 + 8)² = 144.
    net = Net(
        lambda n, x: n.b(n.dw(n.a(x)).square()),
        a=matrix([[1.0], [2.0]]),
        dw=matrix([[2.0], [-1.0]], groups=2),
        b=matrix([[5.0, 1.0]]),
    )
    assert importance(net, image(1.0), torch.sum) == {'a': [3600, 144]}


def test_group_conv_sums_the_channels_of_a_conv_group_first():
    # a = (1, 2, 3, 4); g reads (1, 2) and (3, 4) and gives 1·1 - 1·2 = -1 and
    # 2·3 + 1·4 = 10; b = (2, 1). dL/d(input of g) = 2·(1, -1), 1·(2, 1).
    # Unit 0: 2·1 - 2·2 = -2 inside the group, then 2·-1 = -2 from b: (-4)² = 16.
    # Unit 1: 2·3 + 1·4 = 10, then 1·10 = 10: 20² = 400.
    net = Net(
        lambda n, x: n.b(n.g(n.a(x))),
        a=matrix([[1.0], [2.0], [3.0], [4.0]]),
        g=matrix([[1.0, -1.0], [2.0, 1.0]], groups=2),
        b=matrix([[2.0, 1.0]]),
    )
    assert importance(net, image(1.0), torch.sum) == {'a': [16, 400]}


def test_linear_sums_over_tokens():
    # Tokens (1) and (2) of one image: A = (1, 2) and (2, 4), dL/dA = (3, -1):
    # the same sums as in the conv pair. Two images of one token each: 9 + 36, 4 + 16.
    net = Net(lambda n, x: n.b(n.a(x)))
    net.a, net.b = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    net.a.weight.data = torch.tensor([[1.0], [2.0]])
    net.b.weight.data = torch.tensor([[3.0, -1.0]])
    one_image = torch.tensor([[[1.0], [2.0]]])  # (N, T, C) = (1, 2, 1)
    assert importance(net, one_image, torch.sum) == {'a': [81, 36]}
    two_images = one_image.transpose(0, 1)  # (2, 1, 1)
    assert importance(net, two_images, torch.sum) == {'a': [45, 20]}
    assert importance(net, two_images[:, 0], torch.sum) == {'a': [45, 20]}


def test_flattened_positions_are_summed():
    # One unit is both positions of its channel in the FC layer's input: A = (1, 2) and
    # (2, 4), weights (3, 1) and (-1, 2): (3 + 2)² = 25, (-2 + 8)² = 36.
    net = Net(lambda n, x: n.fc(n.a(x).flatten(1)), a=matrix([[1.0], [2.0]]))
    net.fc = nn.Linear(4, 1, bias=False)
    net.fc.weight.data = torch.tensor([[3.0, 1.0, -1.0, 2.0]])
    assert importance(net, image(1.0, 2.0), torch.sum) == {'a': [25, 36]}


def test_mask_gradient_by_layout():
    x = torch.arange(8.0).reshape(2, 2, 2)
    grad = torch.ones(2, 2, 2)
    assert mask_gradient(x, grad, 1).tolist() == [[1, 5], [9, 13]]
    assert mask_gradient(x, grad, -1).tolist() == [[2, 4], [10, 12]]
    assert mask_gradient(x[..., None], grad[..., None], 1).tolist() == [[1, 5], [9, 13]]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    # In its own type a sum of ones ends at 2048 or 256.
    x = torch.ones(1, 1, 3000, dtype=dtype)
    total = mask_gradient(x, x, 1)
    assert total.dtype == torch.float32
    assert total.item() == 3000


def laid_out(shape, how):
    """A random tensor whose elements lie in memory in another order."""
    if how == 'channels_last':
        return torch.randn(shape).to(memory_format=torch.channels_last)
    if how == 'slice':
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    if how == 'expanded':
        return torch.randn(*shape[:2], 1, 1).expand(shape)
    return torch.randn(shape)


@pytest.mark.parametrize('tile', [1, 7, 50, 10**6])
@pytest.mark.parametrize('how', ['contiguous', 'channels_last', 'slice', 'expanded'])
def test_mask_gradient_in_tiles(monkeypatch, tile, how):
    """However small the tiles are, down to one element, and wherever they lie."""
    monkeypatch.setattr(mask_gradients, 'TILE', tile)
    torch.manual_seed(0)
    x, grad = laid_out((3, 4, 5, 6), how), torch.randn(3, 4, 5, 6)
    for a, b in ((x, grad), (grad, x)):
        torch.testing.assert_close(mask_gradient(a, b, 1), (x * grad).sum((2, 3)))
        torch.testing.assert_close(mask_gradient(a, b, -1), (x * grad).sum((1, 2)))
    flat = (x * grad)[..., 0, 0]
    found = mask_gradient(x[..., 0, 0], grad[..., 0, 0], -1)
    torch.testing.assert_close(found, flat)


@pytest.mark.parametrize('tile', [1, 3, 10**6])
def test_rows_of_an_image_are_summed_tile_by_tile(monkeypatch, tile):
    # Rows 0 and 3 are of image 1, row 1 is of image 0, row 2 of none.
    monkeypatch.setattr(mask_gradients, 'TILE', tile)
    rows = Rows(2, torch.tensor([1, 0, -1, 1]))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    expected = [[30, 40], [80, 100]]  # times ten
    assert mask_gradient(x, torch.full_like(x, 10), -1, rows).tolist() == expected
    pixels = x[..., None, None]
    grad = torch.full_like(pixels, 10)
    assert mask_gradient(pixels, grad, 1, rows).tolist() == expected


def test_no_product_of_the_input_s_size_is_held():
    x = torch.randn(2, 64, 128, 128).to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as seen:
        mask_gradient(x, x, 1)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest <= 4 * mask_gradients.TILE < x.nbytes / 8


def test_unit_gradients_leave_out_channels_of_no_unit():
    gradients = {'p': torch.tensor([[1.0, 10.0, 100.0]]), 'q': torch.tensor([[5.0]])}
    units = {'p': torch.tensor([1, -1, 0]), 'q': torch.tensor([1])}
    assert unit_gradients(gradients, units, 3).tolist() == [[100, 6, 0]]


# -- against explicit masks ---------------------------------------------------


def assert_equals_masks(model, loss=toy_loss, count=2, forward=None):
    """Compare each unit, relative to itself."""
    pruner = prepared(model, loss, forward, count)
    pruner.criterion.tap.detach()
    expected = mask_fisher(model, loss, pruner.units.grouping.groups, count).double()
    pruner.criterion.tap.attach()
    iterate(pruner, loss)
    assert expected.count_nonzero() > 0
    found, least = torch.from_numpy(importance_of(pruner)), 1e-9 * float(expected.max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=least)
    return pruner


@pytest.mark.parametrize('toy', TOYS)
def test_toys_equal_explicit_masks(toy):
    torch.manual_seed(0)
    assert_equals_masks(toy().double(), lambda m: toy_loss(m, 3), 3)


@pytest.mark.parametrize('training', [True, False])
def test_norms_may_use_either_statistics(training):
    torch.manual_seed(0)
    assert_equals_masks(ResidualPair().double().train(training))


def test_retinanet_equals_explicit_masks():
    """A shared head on four levels, an FPN, training-mode BN, two images."""
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / 'configs/demo/retinanet_r18_fpn_digits.py')
    model = build_model(cfg).double()
    calls = BatchCalls(model, demo_batch(cfg, 2, (64, 64)))
    calls.data['inputs'] = calls.data['inputs'].double()
    assert any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    pruner = assert_equals_masks(model, calls.loss, 2, calls.forward)
    assert len(importance_of(pruner)) > 800


# -- the tap ------------------------------------------------------------------


def tapped(model):
    tap = MaskGradientTap({n: model.get_submodule(n) for n in ('conv1', 'conv2')})
    tap.attach()
    return tap


def inputs_of(layer):
    """Weak references to the storages of what ``layer`` reads from now on."""
    inputs = []
    layer.register_forward_pre_hook(
        lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage()))
    )
    return inputs


def test_tap_changes_neither_outputs_nor_gradients():
    plain, model = ConvPair(), ConvPair()
    model.load_state_dict(plain.state_dict())
    tapped(model)
    for m in (plain, model):
        toy_loss(m).backward()
    assert torch.equal(toy_forward(plain), toy_forward(model))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_tap_sees_layers_whose_input_needs_a_gradient():
    model = ConvPair()
    tap = tapped(model)
    toy_loss(model).backward()
    assert {n: tuple(g.shape) for n, g in tap.take().items()} == {'conv2': (2, 6)}
    assert tap.take() == {}


def test_tap_is_silent_without_gradients():
    model = ConvPair().eval()
    tap = tapped(model)
    with torch.no_grad():
        model(images())
    with torch.inference_mode():
        model(images())
    assert tap.take() == {}
    model(images())  # a forward without a backward
    assert tap.take() == {}


def test_tap_keeps_no_tensor_after_backward():
    model = ConvPair()
    tap, inputs = tapped(model), inputs_of(model.conv2)
    loss = toy_loss(model)
    assert not inputs[0].expired()
    loss.backward()
    assert inputs[0].expired()
    assert [tuple(g.shape) for g in tap.take().values()] == [(2, 6)]


def test_tap_holds_no_memory_of_its_own_before_backward():
    """What is saved for backward is the tensor that the layer saves anyway."""
    model = ConvPair()

    def saved():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images()).sum()
        return sum(storages.values())

    before = saved()
    tapped(model)
    assert saved() == before


def test_detached_tap_leaves_no_hook():
    model = ConvPair()
    tap = tapped(model)
    tap.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


class TwoReaders(nn.Module):
    """Two layers read one tensor; so does the sum, which is no layer."""

    def __init__(self, change=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)
        self.change = change

    def forward(self, x):
        x = self.stem(x)
        left = self.left(x)
        if self.change:
            x += 1  # the same tensor with other values
        return self.head(left + self.right(x) + x)


def test_a_tensor_is_contracted_once_for_all_its_readers(monkeypatch):
    torch.manual_seed(0)
    seen = []

    def counted(x, *args):
        seen.append(tuple(x.shape))
        return mask_gradient(x, *args)

    monkeypatch.setattr(taps, 'mask_gradient', counted)
    assert_equals_masks(TwoReaders().double())
    assert len(seen) == 2  # of left with right, and of head


@pytest.mark.parametrize('units', [None, [0, 1, 2, -1]])
def test_layers_of_other_units_are_not_tapped_together(units):
    model = TwoReaders()
    layers = {n: model.get_submodule(n) for n in ('left', 'right')}
    index = units and {'left': torch.arange(4), 'right': torch.tensor(units)}
    tap = MaskGradientTap(layers, units=index)
    tap.attach()
    toy_loss(model).backward()
    assert set(tap.take()) == {'left', 'right'}


def test_a_leaf_that_outlives_the_graph_is_tapped_anew():
    x = torch.ones(1, 2, requires_grad=True)
    layers = {'a': nn.Linear(2, 1), 'b': nn.Linear(2, 1)}
    units = dict.fromkeys(layers, torch.arange(2))
    MaskGradientTap(layers, units=units).attach()
    for _ in range(2):
        (layers['a'](x) + layers['b'](x)).sum().backward()
    assert x.grad is not None


def test_a_forward_without_backward_leaves_nothing_behind():
    model = TwoReaders()
    layers = {n: model.get_submodule(n) for n in ('left', 'right', 'head')}
    MaskGradientTap(layers, units=dict.fromkeys(layers, torch.arange(4))).attach()
    inputs = inputs_of(model.right)
    gc.disable()
    try:
        model(images())
        assert inputs[0].expired()
    finally:
        gc.enable()


def test_silent_tap_adds_no_node_to_the_graph():
    model = ConvPair()
    tap = tapped(model)
    tap.active = False
    loss = toy_loss(model)
    stack, names = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        names.add(node.name())
        stack += [n for n, _ in node.next_functions if n is not None]
    assert not any('Tap' in n for n in names)
    loss.backward()
    assert tap.take() == {}


@pytest.mark.parametrize('frozen', ['conv1', 'conv2', 'all'])
def test_frozen_weights_are_seen_through(frozen):
    """A layer that does not train still has a mask."""
    torch.manual_seed(0)
    free, model = ConvPair().double(), ConvPair().double()
    model.load_state_dict(free.state_dict())
    expected = importance_of(assert_equals_masks(free))
    model.requires_grad_(False)
    if frozen != 'all':
        model.requires_grad_(True).get_submodule(frozen).requires_grad_(False)
    pruner = prepared(model)
    if frozen == 'all':
        assert not toy_loss(model).requires_grad
        assert pruner.criterion.tap.take() == {}
    else:
        iterate(pruner)
        assert importance_of(pruner) == pytest.approx(expected, rel=1e-6)


class InPlace(ResidualPair):
    def forward(self, x):
        x = self.stem(x).relu_()
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        y += x
        return self.head(y.relu_())


def test_in_place_ops_after_layers():
    torch.manual_seed(0)
    assert_equals_masks(InPlace().double())


# -- every k-th iteration -----------------------------------------------------


def test_statistics_of_every_third_iteration_only():
    """Iterations 3 and 6 are watched; all count for the interval."""
    torch.manual_seed(0)
    batches = [images() for _ in range(7)]
    pruner = prepared(ResidualPair(), statistics_interval=3)
    sums = []
    for x in batches:
        iterate(pruner, lambda model, x=x: square_loss(model(x)))
        sums.append(importance_of(pruner))
    assert pruner.iteration == 7
    assert not sums[0].any() and not sums[1].any()
    assert seen_by(pruner).max() == 2
    assert (sums[2] == sums[4]).all() and (sums[4] <= sums[5]).all()
    assert (sums[5] == sums[6]).all() and sums[5].sum() > sums[4].sum() > 0


def test_resumed_pruner_keeps_the_turn():
    first, second = (prepared(ConvPair(), statistics_interval=2) for _ in range(2))
    iterate(first, lambda model: model(images()).sum())
    assert first.criterion.tap.active
    second.load_state_dict(first.state_dict())
    assert second.criterion.tap.active


@pytest.mark.parametrize('every', [0, 11, 1.5])
def test_statistics_every_must_fit_the_interval(every):
    with pytest.raises(ConfigError, match='statistics_interval'):
        GroupFisherPruner(ConvPair(), interval=10, statistics_interval=every)
