"""Products of activations with each other, as in attention.

Single channels cannot go from the dimension that is summed over. An index of a batch
dimension can go as a whole: an attention head, if all of its channels are one unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgfp.tracing.labels import varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value, fill_unlabelled, planes_of


@register_rule('Bmm')
def batched_matmul(ctx: Context, operands: Operands) -> Value:
    """Multiply (B, M, K) by (B, K, N): B, M and N pass; what is summed over stays."""
    left, right = operands
    outer = _outer(ctx, left, 1) + _outer(ctx, right, 2)
    batch = _batch(ctx, operands, frozenset({0}))
    return ctx.value(batch + outer, like=Value(ctx.shape))


@register_rule('Baddbmm')
def batched_addmm(ctx: Context, operands: Operands) -> Value:
    """A batched product and a sum; the summand has no channels of its own."""
    summand, left, right = operands
    ctx.freeze_value(summand, 'added to a product by')
    for value in (left, right):  # whose batch the summand may fix
        _freeze_along(ctx, value, {0})
    return ctx.value(
        _outer(ctx, left, 1) + _outer(ctx, right, 2), like=Value(ctx.shape)
    )


@register_rule(
    'ScaledDotProductFlashAttentionForCpu', 'ScaledDotProductFlashAttention',
    'ScaledDotProductEfficientAttention', 'ScaledDotProductCudnnAttention',
    'ScaledDotProductFusedAttentionOverrideable',
)  # fmt: skip
def scaled_dot_product(ctx: Context, operands: Operands) -> list[Value]:
    """Queries, keys and values (B, heads, N, C) and a bias (B, heads, N, N)."""
    bias = [v for v in operands[3:] if v is not None]
    planes = _batch(ctx, [*operands[:3], *bias], frozenset({0, 1}))
    for value in operands:
        _freeze_along(ctx, value, {2, 3})
    like = Value(ctx.shape)
    others = [Value(shape) for shape in ctx.out_shapes[1:]]  # for backward alone
    return [ctx.value(planes, like=like), *others]


@register_rule(
    'Mv', 'Dot', 'Cdist', 'EuclideanDist', 'MultiScaleDeformableAttnFunction',
    'FlashAttention', 'EfficientAttention',
)  # fmt: skip
def contract(ctx: Context, operands: Operands) -> list[Value]:
    """Sums over the channels of two activations, none of which can go alone."""
    for value in operands:
        ctx.freeze_value(value, 'multiplied with an activation by')
    return [Value(shape) for shape in ctx.out_shapes]


def _freeze_along(ctx: Context, value: Value | None, dims: set[int]) -> None:
    """Freeze the planes of a factor that vary along one of ``dims``."""
    for plane in planes_of(value):
        if varying(plane) & dims:
            ctx.freeze(plane, _reason(ctx, plane))


def _outer(ctx: Context, value: Value | None, dim: int) -> list[Tensor]:
    """Return the planes along the dimension of a factor that the result keeps."""
    passed = []
    for plane in planes_of(value):
        if varying(plane) == {dim}:
            passed.append(plane)
        elif varying(plane) != {0}:
            ctx.freeze(plane, _reason(ctx, plane))
    return passed


def _batch(
    ctx: Context, values: Sequence[Value | None], dims: frozenset[int]
) -> list[Tensor]:
    """Equate the planes of all factors along the batch dimensions; return one for all.

    A factor without such a plane has a batch of fixed size. Factors with batches of
    different sizes share them in a way that the labels do not show.
    """
    batches = [[p for p in planes_of(v) if varying(p) <= dims] for v in values]
    every = [plane for planes in batches for plane in planes]
    sizes = {(d, plane.shape[d]) for plane in every for d in varying(plane)}
    alike = len(sizes) == len({d for d, _ in sizes})
    if not alike or any(len(planes) != 1 for planes in batches):
        for plane in every:
            ctx.freeze(plane, 'multiplied with a tensor of fixed width by')
        return []
    # Factors may vary along different batch dimensions, the result along all of them.
    result, *others = every
    for plane in others:
        ctx.table.equate(result, plane)
        shape = torch.broadcast_shapes(result.shape, plane.shape)
        result = fill_unlabelled(result.expand(shape), plane)
    return [result]


def _reason(ctx: Context, plane: Tensor) -> str:
    """Say why channels stay that are summed over; the op's name follows."""
    owner = ctx.attention_owner(plane)
    what = 'multiplied with an activation by'
    if owner is None or owner.spec is not None:
        return what
    return (
        f'in attention heads of {owner.class_name}, which has no AttentionSpec, {what}'
    )
