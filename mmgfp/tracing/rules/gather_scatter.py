"""Ops that move or overwrite elements at positions that data decides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmgfp.tracing.labels import varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value


@register_rule('Gather')
def gather(ctx: Context, operands: Operands) -> Value:
    """Pick along one dimension; along the others an end may be cut off."""
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    planes = []
    for plane in ctx.unmixed(value.planes, {dim}, 'picked from by'):
        # The index may be shorter than the tensor, which cuts off what lies behind it.
        for d in varying(plane):
            plane = plane.narrow(d, 0, ctx.shape[d])
        planes.append(plane)
    return ctx.value(planes, like=value)


@register_rule('Roll')
def roll(ctx: Context, operands: Operands) -> Value:
    """Shift elements around."""
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    # Without dimensions, torch shifts through the whole tensor, element by element.
    dims = ctx.saved('dims') or range(len(ctx.shape))
    moved = ctx.signed_dims(dims, len(ctx.shape))
    planes = ctx.unmixed(value.planes, moved, 'shifted along the channels by')
    return ctx.value(planes, like=value)


@register_rule('Rot90', 'Tril', 'Triu', 'FftR2C', 'FftC2R', 'FftC2C')
def rearranged(ctx: Context, operands: Operands) -> Value:
    """Turn, cut off or transform what lies along some dimensions, the last two here.

    Fourier transforms and rotations say which.
    """
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    saved = next((n for n in ('dims', 'dim') if hasattr(ctx.node, f'_saved_{n}')), None)
    dims = ctx.signed_dims(ctx.saved(saved) if saved else (-2, -1), len(value.shape))
    planes = ctx.unmixed(value.planes, dims, 'moved along the channels by')
    return ctx.value(planes, like=value)


@register_rule('CopyBackwards')
def copy(ctx: Context, operands: Operands) -> Value:
    """Overwrite all of a tensor, ``x.copy_(y)``."""
    value = operands[-1]
    if value is None:
        return Value(ctx.shape)
    return _placed(ctx, value)


@register_rule('CopySlices')
def copy_slices(ctx: Context, operands: Operands) -> Value:
    """Overwrite a part of a tensor, ``x[part] = y``; the graph does not say which.

    Where ``y`` has as many channels as ``x``, they are the same ones; elsewhere
    both stay as they are.
    """
    base, *others = operands
    source = next((v for v in others if v is not None), None)
    if source is None or not source.planes:
        ctx.freeze_value(base, 'partly overwritten by')
        return Value(ctx.shape)
    result = _placed(ctx, source)
    if base is None:  # memory that was filled with a constant, such as zeros
        return result
    for plane in base.planes:
        for other in result.planes:
            if varying(other) == varying(plane):
                ctx.table.equate(plane, other)
                break
        else:
            ctx.freeze(plane, 'partly overwritten by')
    if not base.planes:
        for plane in result.planes:
            ctx.freeze(plane, 'put into a tensor of fixed width by')
    return result


def _placed(ctx: Context, value: Value) -> Value:
    """Return ``value`` in a tensor of this op's shape, aligned at the end."""
    planes = []
    for plane in value.planes:
        missing = len(ctx.shape) - plane.dim()
        if missing >= 0:
            plane = plane.reshape((1,) * missing + tuple(plane.shape))
        if missing >= 0 and all(ctx.shape[d] == plane.shape[d] for d in varying(plane)):
            planes.append(plane)
        else:
            ctx.freeze(plane, 'put at positions that the graph does not show by')
    return ctx.value(planes, like=Value(ctx.shape))


@register_rule('Im2Col')
def im2col(ctx: Context, operands: Operands) -> Value:
    """Turn (N, C, H, W) into (N, C k², L): a channel becomes the k² of its window."""
    return _windows(ctx, operands[0], math.prod(ctx.saved('kernel_size')))


@register_rule('PixelUnshuffle')
def pixel_unshuffle(ctx: Context, operands: Operands) -> Value:
    """Turn (N, C, H r, W r) into (N, C r², H, W)."""
    return _windows(ctx, operands[0], ctx.saved('downscale_factor') ** 2)


def _windows(ctx: Context, value: Value | None, area: int) -> Value:
    if value is None:
        return Value(ctx.shape)
    others, planes = set(range(len(value.shape))) - {1}, []
    for plane in ctx.unmixed(value.planes, others, 'positions are mixed by'):
        labels = plane.reshape(-1).repeat_interleave(area)  # (C k²,)
        planes.append(_channels(labels, len(ctx.shape)))
    return ctx.value(planes, like=Value(ctx.shape))


@register_rule('Col2Im')
def col2im(ctx: Context, operands: Operands) -> Value:
    """Turn (N, C k², L) into (N, C, H, W): the k² of a window make one channel."""
    value, area = operands[0], math.prod(ctx.saved('kernel_size'))
    if value is None:
        return Value(ctx.shape)
    others, planes = set(range(len(value.shape))) - {1}, []
    for plane in ctx.unmixed(value.planes, others, 'positions are mixed by'):
        rows = ctx.table.merge(plane.reshape(-1, area), 1)  # (C, 1)
        planes.append(_channels(rows, len(ctx.shape)))
    return ctx.value(planes, like=Value(ctx.shape))


def _channels(labels: Tensor, rank: int) -> Tensor:
    """Return labels of channels as a plane of ``rank`` dimensions, (1, C, 1, ...)."""
    return torch.reshape(labels, (1, -1) + (1,) * (rank - 2))


@register_rule('Topk', 'Sort', 'Cummax', 'Cummin', 'Cumprod')
def ordered(ctx: Context, operands: Operands) -> list[Value]:
    """Elements along one dimension change places."""
    value = operands[0]
    if value is None:
        return [Value(shape) for shape in ctx.out_shapes]
    dims = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    planes = ctx.unmixed(value.planes, dims, 'channels are ordered by')
    return [ctx.value(planes, value, shape) for shape in ctx.out_shapes]


@register_rule('Scatter', 'ScatterAdd', 'ScatterReduce', 'IndexAdd', 'MaskedSelect')
def scatter(ctx: Context, operands: Operands) -> Value:
    """Elements come from several tensors, as data decides."""
    for value in operands:
        ctx.freeze_value(value, 'put at positions that data decides by')
    return Value(ctx.shape)
