"""Products of activations with each other, as in attention."""

from __future__ import annotations

from mmgfp.tracing.labels import varying
from mmgfp.tracing.rules.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value


@register_rule('Bmm')
def batched_matmul(ctx: Context, operands: Operands) -> Value:
    """(B, M, K) times (B, K, N): M and N pass; what is summed over stays."""
    return _product(ctx, operands[0], operands[1])


@register_rule('Baddbmm')
def batched_addmm(ctx: Context, operands: Operands) -> Value:
    """A batched product and a sum; the summand has no channels of its own."""
    ctx.freeze_value(operands[0], 'added to a product by')
    return _product(ctx, operands[1], operands[2])


def _product(ctx: Context, left: Value | None, right: Value | None) -> Value:
    passed = []
    for value, outer in ((left, 1), (right, 2)):
        for plane in value.planes if value else ():
            if varying(plane) == {outer}:
                passed.append(plane)
            else:
                ctx.freeze(plane, 'multiplied with an activation by')
    return ctx.value(passed, like=Value(ctx.shape))


@register_rule(
    'Mv', 'Dot', 'Cdist', 'EuclideanDist', 'ScaledDotProductFlashAttentionForCpu',
    'ScaledDotProductFlashAttention', 'ScaledDotProductEfficientAttention',
    'ScaledDotProductCudnnAttention', 'MultiScaleDeformableAttnFunction',
)  # fmt: skip
def attend(ctx: Context, operands: Operands) -> list[Value]:
    """Sums over the channels of two activations, none of which can go alone."""
    for value in operands:
        ctx.freeze_value(value, 'multiplied with an activation by')
    return [Value(shape) for shape in ctx.out_shapes]
