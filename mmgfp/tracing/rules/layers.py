"""Layers: ops that contract an activation with a weight and issue new channels."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgfp.tracing.labels import NO_LABEL, varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, LayerCall, Value, planes_of

#: Ops that contract an activation with a weight, and the operands that are factors.
LAYER_OPS: dict[str, tuple[int, ...]] = {
    'Convolution': (0, 1),
    'Addmm': (1, 2),
    'Mm': (0, 1),
    'DeformConv2dFunction': (0, 1, 2),  # the weight's place with torchvision and mmcv
    'ModulatedDeformConv2dFunction': (0, 3),
}
#: Buffers beside a weight that scale and shift its output channels, as mmcv's
#: `ConvAWS2d` has them.
SCALES = ('weight_gamma', 'weight_beta')
#: Why the input channels of a layer stay whose weight has no labels for them.
UNLABELLED_WEIGHT = 'read as the only channel, or with a weight of fixed width, by'


@register_rule('Convolution')
def convolution(ctx: Context, operands: Operands) -> Value:
    """Issue labels for the output channels; input channels meet the weight's."""
    value, weight, bias = operands
    transposed, groups = ctx.saved('transposed'), ctx.saved('groups')
    return _convolve(ctx, (value, weight, bias), transposed, groups)


@register_rule('DeformConv2dFunction', 'ModulatedDeformConv2dFunction')
def deform_convolution(ctx: Context, operands: Operands) -> Value:
    """A convolution at positions that offsets (and a modulation) decide.

    Operands are input, offset and weight, or input, offset, mask, weight and bias; with
    torchvision input, weight, offset, mask and bias.
    """
    if not hasattr(ctx.node, 'deform_groups'):
        return _torchvision_deform_convolution(ctx, operands)
    modulated = len(operands) > 3
    value, weight = operands[0], operands[3 if modulated else 2]
    bias = operands[4] if modulated and len(operands) > 4 else None
    moved = operands[1 : 3 if modulated else 2]
    node = ctx.node
    return _deform(ctx, (value, weight, bias), moved, node.groups, node.deform_groups)


def _torchvision_deform_convolution(ctx: Context, operands: Operands) -> Value:
    """Replay torchvision's op, whose settings follow from the operands' shapes."""
    value, weight, offset, mask, bias = operands
    groups, parts = 1, 1
    if value is not None and weight is not None:
        groups = value.shape[1] // weight.shape[1]
        if offset is None:
            ctx.freeze_value(value, 'read at offsets that need no gradient by')
        else:
            parts = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    return _deform(ctx, (value, weight, bias), (offset, mask), groups, parts)


def _deform(
    ctx: Context, operands: Operands, moved: Operands, groups: int, parts: int
) -> Value:
    """Convolve ``parts`` equal parts of the input, each with offsets of its own."""
    for offset in moved:
        ctx.freeze_value(offset, 'read as offsets by')
    value = operands[0]
    if parts > 1:
        # The parts must stay equally wide.
        for plane in planes_of(value):
            if varying(plane) == {1}:
                ctx.merge(plane.reshape(parts, -1), 0)
    return _convolve(ctx, operands, False, groups)


def _convolve(ctx: Context, operands: Operands, transposed: bool, groups: int) -> Value:
    value, weight, bias = operands
    if weight is None or ctx.is_constant(weight):
        return _filter(ctx, value, weight, bias, groups)
    if ctx.is_constant(value):
        value = None
    if not weight.from_parameters:
        # Kernels that another layer computes, whose entries are its output channels.
        for factor in operands:
            ctx.freeze_value(factor, 'multiplied with an activation by')
        return Value(ctx.shape)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    channels = value.shape[1] if value else _input_channels(weight, in_dim, groups)
    labels = _input_vector(ctx, value, channels)
    if groups == 1:
        out = _vector(weight, out_dim)
        _read(ctx, labels, _vector(weight, in_dim))
    elif _name(ctx, weight) in ctx.narrowed:
        out = _tie_positions(ctx, labels, weight, groups)
    else:
        # The tied dimension is removed in whole conv groups, the other one not.
        tied = _vector(weight, 0)
        out = _tie_groups(ctx, labels, tied, groups, transposed)
    _record(ctx, weight, labels, transposed, groups)
    if out is None:
        return Value(ctx.shape)
    for plane in planes_of(bias):
        ctx.table.equate(out, plane.reshape(-1))
    for vector in _scales(ctx, weight, len(out)):
        ctx.table.equate(out, vector)
    ctx.table.produce(out)
    plane = out.reshape((1, -1) + (1,) * (len(ctx.shape) - 2))
    return ctx.value([plane], like=Value(ctx.shape))


def _filter(
    ctx: Context,
    value: Value | None,
    weight: Value | None,
    bias: Value | None,
    groups: int,
) -> Value:
    """Convolve with fixed weights, maybe of a buffer, that belong to no layer.

    Depth-wise filters go with the channel that each of them reads.
    """
    channels = ctx.shape[1]
    if value is None or groups != value.shape[1] or groups == 1:
        for operand in (value, weight, bias):
            ctx.freeze_value(operand, 'read with a fixed weight by')
        return Value(ctx.shape)
    labels = _input_vector(ctx, value, groups)
    outputs = labels.repeat_interleave(channels // groups)  # (C_out,)
    for plane in planes_of(weight):
        # A transposed filter has one entry for each input, all others for each output.
        along = {len(labels): labels, len(outputs): outputs}.get(plane.shape[0])
        if along is not None:
            ctx.table.equate(plane.reshape(-1), along)
    for plane in planes_of(bias):
        ctx.table.equate(plane.reshape(-1), outputs)
    shape = (1, -1) + (1,) * (len(ctx.shape) - 2)
    return ctx.value([outputs.reshape(shape)], like=Value(ctx.shape))


def _input_channels(weight: Value, in_dim: int, groups: int) -> int:
    return weight.shape[in_dim] * (groups if in_dim == 1 else 1)


def _vector(weight: Value, dim: int) -> Tensor | None:
    """Return the weight's labels along ``dim``, (size,), or None if it has none."""
    for plane in weight.planes:
        if varying(plane) == {dim}:
            return plane.reshape(-1)
    return None


def _input_vector(ctx: Context, value: Value | None, channels: int) -> Tensor:
    """Return one label per input channel, (C_in,); freeze what cannot be followed."""
    labels = torch.full((channels,), NO_LABEL)
    for plane in planes_of(value):
        dims, what = varying(plane), 'positions are mixed by'
        if 1 in dims and ctx.unmixed([plane], dims - {0, 1}, what):
            labels = ctx.table.merge(plane, 0).reshape(-1)
        else:
            ctx.freeze(plane, 'read across positions by')
    return labels


def _read(ctx: Context, labels: Tensor, vector: Tensor | None) -> None:
    """Let a layer's input dimension follow the channels that it reads."""
    if vector is None:
        ctx.freeze(labels, UNLABELLED_WEIGHT)
        return
    ctx.table.equate(labels, vector)
    # A layer may read other channels in another call, which cannot go without these.
    ctx.freeze(
        vector[labels == NO_LABEL], 'input channels that no layer makes are read by'
    )
    ctx.table.consume(vector)


def _tie_groups(
    ctx: Context, labels: Tensor, tied: Tensor | None, groups: int, transposed: bool
) -> Tensor | None:
    """Couple each conv group's inputs with its outputs; the unit is the group.

    Returns:
        Tensor: Labels of the outputs, (C_out,); None if the weight has none.
    """
    if tied is None:
        ctx.freeze(labels, UNLABELLED_WEIGHT)
        return None
    rows, inputs = tied.reshape(groups, -1), labels.reshape(groups, -1)
    ctx.table.merge(rows, 1)
    ctx.table.equate(rows[:, :1], inputs)
    if (labels == NO_LABEL).any():
        unknown = (inputs == NO_LABEL).any(1)
        ctx.freeze(rows[unknown], 'input channels that no layer makes are read by')
    if transposed:
        # (C_in, C_out / G, ...): a group's inputs stand for its outputs, of which no
        # dimension of the weight holds all.
        ctx.table.produce(tied)
        return rows[:, :1].expand(groups, ctx.shape[1] // groups).reshape(-1)
    return tied


def _scales(ctx: Context, weight: Value, channels: int) -> list[Tensor]:
    """Return the labels of a standardised weight's buffers, which are in no graph."""
    module = (_name(ctx, weight) or '').rpartition('.')[0]
    names = [f'{module}.{name}' for name in SCALES]
    buffers = set(ctx.buffers.values())
    return [ctx.table.vector(n, 0, channels) for n in names if n in buffers]


def _tie_positions(
    ctx: Context, labels: Tensor, weight: Value, groups: int
) -> Tensor | None:
    """Keep all conv groups and let each lose the same channels."""
    out, inputs = _vector(weight, 0), labels.reshape(groups, -1)
    if out is not None:
        ctx.merge(out.reshape(groups, -1), 0)
    _read(ctx, ctx.merge(inputs, 0).reshape(-1), _vector(weight, 1))
    return out


def _name(ctx: Context, weight: Value) -> str | None:
    """Return the name of the parameter that a weight is computed from."""
    names = [n for p in weight.planes if varying(p) for n in ctx.table.owners(p)]
    buffers = set(ctx.buffers.values())  # which may scale it
    return next((n for n in names if n not in buffers), None)


def _record(
    ctx: Context, weight: Value, labels: Tensor, transposed: bool, groups: int
) -> None:
    name = _name(ctx, weight)
    if name is not None:
        ctx.calls.append(LayerCall(name, labels, transposed, groups))


@register_rule(
    'CudnnRnn', 'MiopenRnn', 'MkldnnRnnLayer', 'ThnnFusedLstmCell', 'ThnnFusedGruCell'
)
def recurrent(ctx: Context, operands: Operands) -> list[Value]:
    """A recurrent layer, whose gates are all as wide as its state."""
    for value in operands:
        ctx.freeze_value(value, 'read or made by a recurrent layer,')
    return [Value(shape) for shape in ctx.out_shapes]


@register_rule('Addmm')
def addmm(ctx: Context, operands: Operands) -> Value:
    """A fully connected layer with a bias."""
    bias, left, right = operands
    result = _matmul(ctx, left, right)
    for plane in planes_of(bias):
        for other in result.planes:
            if varying(other) == {1}:
                ctx.table.equate(other.reshape(-1), plane.reshape(-1))
    return result


@register_rule('Mm')
def mm(ctx: Context, operands: Operands) -> Value:
    """A fully connected layer without a bias."""
    return _matmul(ctx, operands[0], operands[1])


def _matmul(ctx: Context, left: Value | None, right: Value | None) -> Value:
    """Multiply (A, K) by (K, B): inner dimensions meet, outer ones pass on."""
    left, right = (None if ctx.is_constant(v) else v for v in (left, right))
    # `inner` is the value's contracted dimension and the weight's free one.
    value, weight, inner = left, right, 1
    if left is not None and left.from_parameters:
        value, weight, inner = right, left, 0
    if weight is None or not weight.from_parameters:
        ctx.freeze_value(left, 'multiplied with an activation by')
        ctx.freeze_value(right, 'multiplied with an activation by')
        return Value(ctx.shape)
    labels = torch.full((weight.shape[1 - inner],), NO_LABEL)
    passed = []
    for plane in planes_of(value):
        if inner in varying(plane):
            labels = ctx.table.merge(plane, 1 - inner).reshape(-1)
        else:
            passed.append(plane)
    _read(ctx, labels, _vector(weight, 1 - inner))
    out = _vector(weight, inner)
    _record(ctx, weight, labels, False, 1)
    if out is not None:
        ctx.table.produce(out)
        passed.append(out.reshape((1, -1) if inner == 1 else (-1, 1)))
    return ctx.value(passed, like=Value(ctx.shape))
