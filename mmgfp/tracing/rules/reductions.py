"""Ops that reduce or normalise over dimensions."""

from __future__ import annotations

import torch

from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value

#: Ops that reduce the dimensions that their node saved, or all where it saved none.
REDUCTION_OPS = (
    'Sum', 'Mean', 'Amax', 'Amin', 'Max', 'Min', 'Std', 'Var', 'LinalgVectorNorm',
    'Norm', 'Logsumexp', 'Prod', 'VarMean', 'StdMean',
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
    reduced = frozenset(ctx.signed_dims(dims, rank))
    keepdim = len(ctx.shape) == rank
    what = 'channels are reduced, before any mask on them, by'
    if value.from_parameters:  # as weight standardisation does
        what = 'read with a weight that is normalised over its input channels by'
    planes = []
    for plane in value.planes:
        if ctx.mixed(plane, reduced, what):
            continue
        if not keepdim:
            kept = [size for d, size in enumerate(plane.shape) if d not in reduced]
            plane = plane.reshape(kept)
        planes.append(plane)
    return [ctx.value(planes, like=value, shape=shape) for shape in ctx.out_shapes]


@register_rule('Softmax', 'SafeSoftmax', 'LogSoftmax', 'Cumsum')
def along(ctx: Context, operands: Operands) -> Value:
    """Elements along one dimension are mixed."""
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    dim = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    what = 'channels are normalised together by'
    planes = [p for p in value.planes if not ctx.mixed(p, frozenset(dim), what)]
    return ctx.value(planes, like=value)


@register_rule('NativeLayerNorm')
def layer_norm(ctx: Context, operands: Operands) -> Value:
    """The mean over channels depends on every one of them."""
    value = operands[0]
    rank = len(ctx.saved('normalized_shape'))
    mixed = frozenset(range(len(ctx.shape) - rank, len(ctx.shape)))
    what = 'channels are normalised together by'
    for affine in operands[1:]:
        ctx.freeze_value(affine, what)
    planes = [
        p for p in (value.planes if value else ()) if not ctx.mixed(p, mixed, what)
    ]
    return ctx.value(planes, like=Value(ctx.shape))


@register_rule('PixelShuffle')
def pixel_shuffle(ctx: Context, operands: Operands) -> Value:
    """(N, C r², H, W) to (N, C, H r, W r): r² input channels make one output."""
    value = operands[0]
    if value is None:
        return Value(ctx.shape)
    area = ctx.saved('upscale_factor') ** 2
    planes = []
    for plane in value.planes:
        others = frozenset(range(plane.dim())) - {1}
        if not ctx.mixed(plane, others, 'positions are mixed by'):
            rows = plane.reshape(-1, area)  # (C, r²)
            merged = ctx.table.merge(rows, 1)
            planes.append(torch.reshape(merged, (1, -1, 1, 1)))
    return ctx.value(planes, like=value)
