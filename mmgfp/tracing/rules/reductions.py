"""Ops that reduce or normalise over dimensions."""

from __future__ import annotations

import torch

from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value, planes_of

#: Ops that reduce the dimensions that their node saved, or all where it saved none.
REDUCTION_OPS = (
    'Sum', 'Mean', 'Amax', 'Amin', 'Max', 'Min', 'Std', 'Var', 'LinalgVectorNorm',
    'Norm', 'Logsumexp', 'Prod', 'VarMean', 'StdMean', 'Nansum', 'Median', 'Nanmedian',
    'Kthvalue', 'Mode',
)  # fmt: skip


@register_rule(*REDUCTION_OPS)
def reduce(ctx: Context, operands: Operands) -> list[Value]:
    """Dimensions that carry labels cannot be reduced; the others vanish."""
    value = operands[0]
    if value is None:
        return [Value(shape) for shape in ctx.out_shapes]
    rank = len(value.shape)
    dims = getattr(ctx.node, '_saved_dim', None)
    if isinstance(dims, int):
        dims = (dims,)
    if not dims:
        dims = range(rank)  # a full reduction
    reduced = ctx.signed_dims(dims, rank)
    keepdim = len(ctx.shape) == rank
    what = 'channels are reduced, before any mask on them, by'
    if value.from_parameters:  # as weight standardisation does
        what = 'read with a weight that is normalised over its input channels by'
    planes = []
    for plane in ctx.unmixed(value.planes, reduced, what):
        if not keepdim:
            sizes = [size for d, size in enumerate(plane.shape) if d not in reduced]
            plane = plane.reshape(sizes)
        planes.append(plane)
    return [ctx.value(planes, like=value, shape=shape) for shape in ctx.out_shapes]


@register_rule('Softmax', 'SafeSoftmax', 'LogSoftmax', 'Cumsum')
def along(ctx: Context, operands: Operands) -> Value:
    """Elements along one dimension are mixed."""
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    dims = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    planes = ctx.unmixed(value.planes, dims, 'channels are normalised together by')
    return ctx.value(planes, like=value)


@register_rule('NativeLayerNorm', 'FusedRmsNorm')
def layer_norm(ctx: Context, operands: Operands) -> Value:
    """The mean over channels depends on every one of them."""
    value = operands[0]
    rank = len(ctx.saved('normalized_shape'))
    mixed = range(len(ctx.shape) - rank, len(ctx.shape))
    what = 'channels are normalised together by'
    # Weight and bias cannot lose entries that the normalised tensor keeps.
    for affine in operands[1:]:
        ctx.freeze_value(affine, what)
    planes = ctx.unmixed(planes_of(value), mixed, what)
    return ctx.value(planes, like=Value(ctx.shape))


@register_rule('PixelShuffle')
def pixel_shuffle(ctx: Context, operands: Operands) -> Value:
    """Turn (N, C r², H, W) into (N, C, H r, W r): r² input channels make one output."""
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    area = ctx.saved('upscale_factor') ** 2
    others, planes = set(range(len(value.shape))) - {1}, []
    for plane in ctx.unmixed(value.planes, others, 'positions are mixed by'):
        rows = ctx.table.merge(plane.reshape(-1, area), 1)  # (C, 1)
        planes.append(torch.reshape(rows, (1, -1, 1, 1)))
    return ctx.value(planes, like=value)
