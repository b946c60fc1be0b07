"""Ops that work element by element, and those that work channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgfp.tracing.labels import varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value, fill_unlabelled, planes_of

#: Ops that pool RoIs from features, of mmcv and of torchvision.
ROI_POOL_OPS = (
    'RoIAlignFunction', 'RoIPoolFunction', 'ROIAlignFunction', 'ROIPoolFunction',
)  # fmt: skip
#: Batch norms of torch, and mmcv's synchronised one.
BATCH_NORM_OPS = (
    'NativeBatchNorm', 'CudnnBatchNorm', 'MiopenBatchNorm', 'SyncBatchNorm',
    'SyncBatchNormFunction',
)  # fmt: skip


def _align(plane: Tensor, rank: int) -> Tensor:
    """Add the leading dimensions that broadcasting implies."""
    return plane.reshape((1,) * (rank - plane.dim()) + tuple(plane.shape))


#: Ops whose results depend, element by element, on one operand or on several.
ELEMENTWISE_OPS = (
    'Abs', 'Acos', 'Acosh', 'Add', 'Addcdiv', 'Addcmul', 'Alias', 'Angle', 'Asin',
    'Asinh', 'Atan', 'Atan2', 'Atanh', 'Ceil', 'Celu', 'Clamp', 'ClampMax', 'ClampMin',
    'Clone', 'Copysign', 'Cos', 'Cosh', 'Deg2Rad', 'Digamma', 'Div', 'Elu', 'Erf',
    'Erfc', 'Erfinv', 'Exp', 'Exp2', 'Expand', 'Expm1',
    'FakeQuantizePerTensorAffineCachemask', 'Fill', 'Floor', 'Fmax', 'Fmin', 'Fmod',
    'Frac', 'Gelu', 'Hardshrink', 'Hardsigmoid', 'Hardswish', 'Hardtanh', 'Hypot', 'I0',
    'LeakyRelu', 'Lerp', 'Lgamma', 'Log', 'Log10', 'Log1P', 'Log2', 'LogSigmoid',
    'Logaddexp', 'Logaddexp2', 'Logit', 'MaskedFill', 'Maximum', 'Minimum', 'Mish',
    'Mul', 'NanToNum', 'NativeDropout', 'Neg', 'Polar', 'Pow', 'PreluKernel', 'Rad2Deg',
    'Reciprocal', 'Relu', 'Remainder', 'Round', 'RreluWithNoise', 'Rsqrt', 'Rsub',
    'Sgn', 'Sigmoid', 'Sign', 'Silu', 'Sin', 'Sinc', 'Sinh', 'Softplus', 'Softshrink',
    'Sqrt', 'Sub', 'Tan', 'Tanh', 'Threshold', 'ToCopy', 'Trunc', 'Where', 'Xlogy',
)  # fmt: skip


@register_rule(*ELEMENTWISE_OPS)
def elementwise(ctx: Context, operands: Operands) -> Value:
    """Equate operands, broadcast together: a channel goes from all or from none."""
    # Constants come last: labels are then of the layers' channels where both have some.
    values = sorted((v for v in operands if v is not None), key=ctx.is_constant)
    merged = _merge_planes(ctx, values)
    # A tensor without labels keeps its width, and would not fit to fewer channels.
    for plane in merged:
        for value in values:
            if _holds_without_labels(value, plane):
                ctx.freeze(plane, 'combined with a tensor of fixed width by')
    if values and ctx.is_constant(values[-1]) and not ctx.is_constant(values[0]):
        # A buffer that meets no channels counts positions, say, which no layer makes.
        alone = [Value(ctx.shape, (plane,), from_parameters=True) for plane in merged]
        merged = [v.planes[0] for v in alone if not ctx.is_constant(v)]
    result = Value(
        ctx.shape, (), bool(values) and all(v.from_parameters for v in values)
    )
    return ctx.value(merged, like=result)


def register_elementwise(*ops: str) -> None:
    """Let channels pass through ops of your own that work element by element.

    Args:
        ops: Class names of `torch.autograd.Function`s, or names of other ops, as
            autograd shows them without ``Backward`` and digits.

    Raises:
        KeyError: If an op has a rule already.

    Examples:
        >>> register_elementwise('MySquareFunction')
        >>> from mmgfp.tracing import LABEL_RULES
        >>> LABEL_RULES.pop('MySquareFunction') is elementwise
        True
    """
    register_rule(*ops)(elementwise)


def _merge_planes(ctx: Context, values: Sequence[Value]) -> list[Tensor]:
    """Equate planes of different operands that label the same dimensions."""
    merged: list[Tensor] = []
    # Planes of one value are of different dimensions, as those of a weight.
    for value in values:
        for raw in value.planes:
            plane = _align(raw, len(ctx.shape))
            dims = varying(plane)
            for i, other in enumerate(merged):
                if varying(other) & dims:
                    ctx.table.equate(other, plane)
                    merged[i] = fill_unlabelled(
                        other.expand(torch.broadcast_shapes(other.shape, plane.shape)),
                        plane,
                    )
                    break
            else:
                merged.append(plane)
    return merged


def _holds_without_labels(value: Value, plane: Tensor) -> bool:
    """Return whether ``value`` has elements, but no labels, along the plane's."""
    shape = (1,) * (plane.dim() - len(value.shape)) + value.shape
    dims = {d for d in varying(plane) if shape[d] > 1}
    labelled = [varying(_align(p, plane.dim())) for p in value.planes]
    return bool(dims) and not any(dims & other for other in labelled)


#: Ops that make positions out of positions, for each channel on its own.
RESAMPLING_OPS = (
    'AdaptiveAvgPool2D', 'AdaptiveAvgPool3D', 'AdaptiveMaxPool2D', 'AdaptiveMaxPool3D',
    'AvgPool2D', 'AvgPool3D', 'CudnnGridSampler', 'FractionalMaxPool2D',
    'FractionalMaxPool3D', 'GridSampler2D', 'GridSampler3D', 'MaxPool2DWithIndices',
    'MaxPool3DWithIndices', 'MaxUnpool2D', 'MaxUnpool3D', 'ReflectionPad1D',
    'ReflectionPad2D', 'ReflectionPad3D', 'ReplicationPad1D', 'ReplicationPad2D',
    'ReplicationPad3D', 'UpsampleBicubic2D', 'UpsampleBicubic2DAa',
    'UpsampleBilinear2D', 'UpsampleBilinear2DAa', 'UpsampleLinear1D',
    'UpsampleNearest1D', 'UpsampleNearest2D', 'UpsampleNearest3D',
    'UpsampleNearestExact1D', 'UpsampleNearestExact2D', 'UpsampleNearestExact3D',
    'UpsampleTrilinear3D',
)  # fmt: skip


@register_rule(*RESAMPLING_OPS)
def resample(ctx: Context, operands: Operands) -> Value:
    """Channels pass; dimensions behind them are mixed."""
    return _resampled(ctx, operands[0])


@register_rule(*ROI_POOL_OPS)
def roi_pool(ctx: Context, operands: Operands) -> Value:
    """Channels pass; images become RoIs."""
    return _resampled(ctx, operands[0], mixed_batch=True)


def _resampled(ctx: Context, value: Value | None, mixed_batch: bool = False) -> Value:
    if value is None:
        return Value(ctx.shape)
    mixed = [*range(2, len(value.shape)), *([0] if mixed_batch else [])]
    planes = ctx.unmixed(value.planes, mixed, 'positions are mixed by')
    return ctx.value(planes, like=value)


@register_rule(*BATCH_NORM_OPS)
def batch_norm(ctx: Context, operands: Operands) -> Value:
    """Channels pass and take weight, bias and running statistics with them."""
    return _normalised(ctx, operands, groups=None)


@register_rule('NativeGroupNorm')
def group_norm(ctx: Context, operands: Operands) -> Value:
    """The channels of one norm group go together."""
    return _normalised(ctx, operands, groups=ctx.saved('group'))


def _normalised(ctx: Context, operands: Operands, groups: int | None) -> Value:
    value, *affine = operands
    shape = value.shape if value else ctx.shape
    vectors = _norm_vectors(ctx, affine, shape[1])
    others = set(range(len(shape))) - {1}
    planes = ctx.unmixed(planes_of(value), others, 'positions are mixed by')
    for plane in planes:
        labels = plane.reshape(-1)  # (C,)
        if groups:
            ctx.table.merge(labels.reshape(groups, -1), 1)
        for vector in vectors:
            ctx.table.equate(labels, vector)
    if not planes:
        for vector in vectors:
            ctx.freeze(vector, 'channels of fixed width are normalised by')
    return ctx.value(planes, like=Value(ctx.shape))


def _norm_vectors(ctx: Context, affine: Operands, channels: int) -> list[Tensor]:
    """Return the labels of a norm layer's weight, bias and buffers, (C,) each."""
    vectors = [plane.reshape(-1) for value in affine for plane in planes_of(value)]
    # Synchronised norms do not save their buffers, which stand beside the weight.
    module = ctx.table.owners(vectors[0])[0].rpartition('.')[0] if vectors else ''
    for name in ('running_mean', 'running_var'):
        buffer = getattr(ctx.node, f'_saved_{name}', None)
        key = f'{module}.{name}'
        if buffer is not None:
            key = ctx.buffers.get(buffer.data_ptr(), '')
        if key in ctx.buffers.values() and channels > 1:
            vectors.append(ctx.table.vector(key, 0, channels))
    return [v for v in vectors if v.numel() == channels]
