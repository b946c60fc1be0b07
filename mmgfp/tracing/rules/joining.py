"""Ops that join tensors, or surround them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgfp.tracing.labels import NO_LABEL, varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value


@register_rule('ConstantPadNd')
def constant_pad(ctx: Context, operands: Operands) -> Value:
    """Surround with elements that no layer makes."""
    value = ctx.known(operands[0])
    pad = ctx.saved('pad')
    planes = []
    for plane in value.planes:
        widths = list(pad)  # before and after, from the last dimension to the first
        for i in range(len(pad) // 2):
            if plane.shape[plane.dim() - 1 - i] == 1:
                widths[2 * i : 2 * i + 2] = [0, 0]
        if any(widths):
            _note_padding(ctx, plane)
        planes.append(F.pad(plane, widths, value=NO_LABEL))
    return ctx.value(planes, like=value)


def _note_padding(ctx: Context, plane: Tensor, what: str = 'padded') -> None:
    """Note that channels are padded: by how many, code may read off tensors."""
    remark = (
        f'channels are {what} by {ctx.op}; if the code takes the width of that from '
        'the sizes of tensors, replace it by a 1x1 convolution'
    )
    ctx.table.note(plane, remark)


@register_rule('Cat')
def cat(ctx: Context, operands: Operands) -> Value:
    """Concatenate along one dimension."""
    values = _cat_values(ctx, operands)
    if values is None:
        return Value(ctx.shape)
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(ctx.shape))
    if all(dim not in varying(p) for v in values for p in v.planes):
        return _joined(ctx, [v.planes for v in values], values)
    parts, others = [], []
    for value in values:
        along = [p for p in value.planes if dim in varying(p)]
        others.append([p for p in value.planes if dim not in varying(p)])
        parts.append(along[0] if along else torch.full((1,) * len(ctx.shape), NO_LABEL))
        for plane in along[1:]:
            ctx.freeze(plane, 'joined unevenly by')
    # Attention joins tokens, beside which the labels of heads lie on a dimension
    # of their own.
    beside = _joined(ctx, others, values).planes
    sizes = list(torch.broadcast_shapes(*(p.narrow(dim, 0, 1).shape for p in parts)))
    expanded = []
    for part, value in zip(parts, values, strict=True):
        if any(v is None for v in operands):
            _note_padding(ctx, part, 'joined with a constant')
        sizes[dim] = value.shape[dim]
        expanded.append(part.expand(sizes))
    return ctx.value([torch.cat(expanded, dim), *beside], like=values[0])


@register_rule('Stack')
def stack(ctx: Context, operands: Operands) -> Value:
    """Concatenate along a new dimension."""
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(ctx.shape))
    values = [
        v and Value(v.shape, tuple(p.unsqueeze(dim) for p in v.planes))
        for v in operands
    ]
    known = [v for v in values if v is not None]
    return _joined(ctx, [v.planes for v in known], known)


def _joined(
    ctx: Context, planes: Sequence[Sequence[Tensor]], values: Sequence[Value]
) -> Value:
    """Join along a dimension without labels: elements at one place are equated."""
    planes = [sorted(some, key=lambda p: sorted(varying(p))) for some in planes]
    most = max(planes, key=len)
    for others in planes:
        pairs = list(zip(most, others, strict=False))
        if len(pairs) < len(most) or not all(varying(a) & varying(b) for a, b in pairs):
            for plane in [*most, *others]:
                ctx.freeze(plane, 'joined with a tensor of fixed width by')
            return Value(ctx.shape)
        for a, b in pairs:
            ctx.table.equate(a, b)
    return ctx.value(most, like=values[0])


def _cat_values(ctx: Context, operands: Operands) -> list[Value] | None:
    """Return the operands of a concatenation; the size of one unknown is inferred."""
    (dim,) = ctx.signed_dims((ctx.saved('dim'),), len(ctx.shape))
    known = sum(v.shape[dim] for v in operands if v is not None)
    unknown = [v for v in operands if v is None]
    # Of several constants the graph does not show which is how wide.
    if len(unknown) > 1:
        for value in operands:
            ctx.freeze_value(value, 'joined with several constants by')
        return None
    shape = list(ctx.shape)
    shape[dim] -= known
    return [Value(tuple(shape)) if v is None else v for v in operands]
