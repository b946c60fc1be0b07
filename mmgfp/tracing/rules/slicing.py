"""Ops that cut a dimension: the real torch function is replayed on the labels."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgfp.tracing.labels import varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value


@register_rule('Slice')
def slice_(ctx: Context, operands: Operands) -> Value:
    """Take a range along one dimension."""
    value = ctx.known(operands[0])
    dim, size = ctx.saved('dim'), value.shape[ctx.saved('dim')]
    # The largest integer stands for an open end.
    window = slice(ctx.saved('start'), min(ctx.saved('end'), size), ctx.saved('step'))
    index = torch.arange(size)[window]
    # Chunks that code computes with slices, such as x[:, : c // 2], are halves as well.
    if size and 2 * len(index) == size and int(index[-1] - index[0]) == len(index) - 1:
        _keep_halves(ctx, value, dim)
    return ctx.value([_take(p, dim, index) for p in value.planes], like=value)


def _keep_halves(ctx: Context, value: Value, dim: int) -> None:
    """Let two halves of the channels stay as wide as each other, as a split does."""
    for plane in value.planes:
        if dim in varying(plane):
            ctx.merge(plane.unflatten(dim, (2, -1)), dim)


@register_rule('Select')
def select(ctx: Context, operands: Operands) -> Value:
    """Take one index of a dimension and drop it."""
    value = ctx.known(operands[0])
    dim, index = ctx.saved('dim'), torch.tensor([ctx.saved('index')])
    index = index % max(value.shape[dim], 1)
    planes = [_take(p, dim, index).squeeze(dim) for p in value.planes]
    return ctx.value(planes, like=value)


@register_rule('Split', 'SplitWithSizes')
def split(ctx: Context, operands: Operands) -> list[Value]:
    """Cut one dimension into several results; equal parts must stay equal."""
    value = ctx.known(operands[0])
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    sizes = [shape[dim] for shape in ctx.out_shapes]
    parts: list[list[Tensor]] = [[] for _ in sizes]
    for plane in value.planes:
        indices = torch.arange(sum(sizes)).split(sizes)
        cut = [_take(plane, dim, index) for index in indices]
        if dim in varying(plane) and len(set(sizes)) == 1:
            ctx.merge(torch.stack(cut), 0)
        for planes, part in zip(parts, cut, strict=True):
            planes.append(part)
    return [
        ctx.value(planes, like=value, shape=shape)
        for planes, shape in zip(parts, ctx.out_shapes, strict=True)
    ]


@register_rule('Unbind')
def unbind(ctx: Context, operands: Operands) -> list[Value]:
    """Cut one dimension into its elements."""
    value = ctx.known(operands[0])
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    return [
        ctx.value(
            [_take(p, dim, torch.tensor([i])).squeeze(dim) for p in value.planes],
            like=value,
            shape=shape,
        )
        for i, shape in enumerate(ctx.out_shapes)
    ]


@register_rule('IndexSelect')
def index_select(ctx: Context, operands: Operands) -> Value:
    """Take listed indices of one dimension."""
    value = ctx.known(operands[0])
    dim, index = ctx.saved('dim'), ctx.saved('index').cpu()
    return ctx.value([_take(p, dim, index) for p in value.planes], like=value)


@register_rule('Glu')
def gated(ctx: Context, operands: Operands) -> Value:
    """Multiply one half of a dimension with the other, which goes along."""
    value = ctx.known(operands[0])
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(value.shape))
    planes = [
        ctx.merge(p.unflatten(dim, (2, -1)), dim).squeeze(dim)
        if dim in varying(p)
        else p
        for p in value.planes
    ]
    return ctx.value(planes, like=value)


@register_rule('Diagonal')
def diagonal(ctx: Context, operands: Operands) -> Value:
    """Take a diagonal of two dimensions, which becomes the last one."""
    value = ctx.known(operands[0])
    saved = ctx.saved('dim1'), ctx.saved('dim2')
    dims = ctx.signed_dims(saved, len(value.shape))
    planes = ctx.unmixed(value.planes, dims, 'a diagonal is taken of them by')
    return ctx.value([p.diagonal(0, *dims) for p in planes], like=value)


@register_rule('Unfold')
def unfold(ctx: Context, operands: Operands) -> Value:
    """Cut one dimension into windows, whose positions become the last dimension."""
    value = ctx.known(operands[0])
    (dim,) = ctx.signed_dims((ctx.saved('dimension'),), len(value.shape))
    planes = ctx.unmixed(value.planes, {dim}, 'channels are cut into windows by')
    return ctx.value([p.unsqueeze(-1) for p in planes], like=value)


def _take(plane: Tensor, dim: int, index: Tensor) -> Tensor:
    """Take elements along one dimension, unless the labels do not depend on it."""
    return plane if plane.shape[dim] == 1 else plane.index_select(dim, index)
