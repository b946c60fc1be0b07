"""Views replayed on labels, and what autograd's nodes say of themselves."""

import pytest
import torch
from torch.nn import functional as F

from mmgfp.tracing.labels import NO_LABEL, LabelTable
from mmgfp.tracing.value import (
    Context,
    Value,
    blocks,
    fill_unlabelled,
    op_name,
    reshape_plane,
    signed,
)

C = torch.arange(4).reshape(1, 4, 1, 1)  # labels of channels


def node_of(x):
    return x.grad_fn


@pytest.mark.parametrize(
    ('source', 'target', 'expected'),
    [
        ((2, 3), (2, 3), [((0,), (0,)), ((1,), (1,))]),
        ((2, 4, 5), (2, 20), [((0,), (0,)), ((1, 2), (1,))]),
        ((2, 20), (2, 4, 5), [((0,), (0,)), ((1,), (1, 2))]),
        ((6, 4), (4, 6), [((0, 1), (0, 1))]),
        ((2, 4, 8), (2, 4, 1, 8), [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        ((2, 4, 0), (8, 0), [((0, 1), (0,)), ((2,), (1,))]),
    ],
)
def test_blocks(source, target, expected):
    assert [(tuple(a), tuple(b)) for a, b in blocks(source, target)] == expected


def test_blocks_of_empty_tensors_cover_all_dimensions():
    found = blocks((2, 0), (0, 7))
    assert [d for ins, _ in found for d in ins] == [0, 1]
    assert [d for _, outs in found for d in outs] == [0, 1]


def test_views_that_leave_channels_alone_write_nothing_out():
    assert reshape_plane(C, (2, 4, 8, 8), (2, 4, 64)).shape == (1, 4, 1)
    assert reshape_plane(C, (2, 4, 8, 8), (1, 2, 4, 8, 8)).shape == (1, 1, 4, 1, 1)


def test_flattening_repeats_each_label():
    plane = reshape_plane(C, (2, 4, 1, 3), (2, 12))
    assert plane.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]


def test_splitting_channels_lays_labels_out():
    plane = reshape_plane(C, (2, 4, 8, 8), (2, 2, 2, 8, 8))
    assert plane.shape == (1, 2, 2, 1, 1)
    assert plane.flatten().tolist() == [0, 1, 2, 3]


def test_joining_channels_with_images_keeps_their_order():
    plane = reshape_plane(C[:, :2], (3, 2, 8, 8), (6, 8, 8))
    assert plane.flatten().tolist() == [0, 1, 0, 1, 0, 1]


def test_labels_of_gaps_come_from_the_other_operand():
    plane = torch.tensor([0, NO_LABEL])
    assert fill_unlabelled(plane, torch.tensor([5, 6])).tolist() == [0, 6]
    assert fill_unlabelled(torch.tensor([0, 1]), plane).tolist() == [0, 1]


def test_negative_integers_are_read_as_such():
    assert signed((1 << 64) - 2) == -2
    assert signed(3) == 3


@pytest.mark.parametrize(
    ('name', 'run'),
    [
        ('Relu', lambda x: x.relu()),
        ('Mean', lambda x: x.mean((2, 3))),
        ('MaxPool2DWithIndices', lambda x: F.max_pool2d(x, 2)),
    ],
)
def test_op_names(name, run):
    assert op_name(node_of(run(torch.ones(1, 1, 4, 4, requires_grad=True)))) == name


def test_op_names_of_functions_written_in_cpp():
    torchvision = pytest.importorskip('torchvision')
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    pooled = torchvision.ops.roi_align(x, torch.tensor([[0.0, 0, 0, 4, 4]]), 2)
    assert op_name(node_of(pooled)) == 'ROIAlignFunction'


def test_a_single_label_left_over_is_frozen():
    table = LabelTable()
    vector = table.vector('weight', 0, 4)
    node = node_of(torch.ones(2, requires_grad=True).exp())
    ctx = Context(table, node, [(2, 1)], {})
    value = ctx.value([vector[:1].reshape(1, 1)], like=Value((2, 4)))
    assert value.planes == ()
    reasons = table.frozen(table.components())
    assert list(reasons.values()) == [['a single channel is picked out by Exp']]
