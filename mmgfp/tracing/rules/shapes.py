"""Ops that move elements: the real torch function is replayed on the labels."""

from __future__ import annotations

from torch import Tensor

from mmgfp.tracing.labels import relax, varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.splits import Split
from mmgfp.tracing.value import (
    Context,
    Shape,
    Value,
    blocks,
    op_name,
    reshape_plane,
)


@register_rule('View', 'UnsafeView', 'ReshapeAlias')
def view(ctx: Context, operands: Operands) -> Value:
    """Join and split dimensions."""
    value = ctx.known(operands[0])
    planes = []
    for plane in value.planes:
        result = relax(reshape_plane(plane, value.shape, ctx.shape))
        if len(value.shape) > 2 or not value.from_parameters:
            result = _keep_split(ctx, value.shape, plane, result)
        planes.append(result)
    return ctx.value(planes, like=value)


def _keep_split(ctx: Context, source: Shape, plane: Tensor, result: Tensor) -> Tensor:
    """Keep a split of C into (groups, C / groups) possible with fewer channels.

    The code fixes the number of groups, so that one channel of each goes at a time, or
    the width of groups, so that whole groups go: see `Split`. Where the groups are
    heads and an `AttentionSpec` says how the code counts them, whole heads go.
    """
    for ins, outs in blocks(source, ctx.shape):
        split = [d for d in outs if d in varying(result)]
        if len(split) <= len(varying(plane) & set(ins)):
            continue
        shrinking = _shrinking(ctx, source, plane, result, outs)
        for dim in split if shrinking is not None else ():
            if dim != shrinking:
                result = ctx.merge(result, dim)
    return result


def _shrinking(
    ctx: Context, source: Shape, plane: Tensor, result: Tensor, outs: range
) -> int | None:
    """Return the dimension of a split that gets smaller; None if all may."""
    if _splits_heads(ctx, result, outs):
        return outs[-2]
    dims = [d for d in outs if d in varying(result)]
    names = tuple(ctx.table.owners(plane))
    split = Split(names, tuple(ctx.shape[d] for d in dims), len(source) > 2)
    if ctx.attention_owner(plane) is not None:  # whose code counts heads
        index = split.default
    else:
        index = ctx.splits.read(split, plane)
    return None if index is None else dims[index]


def _splits_heads(ctx: Context, plane: Tensor, dims: range) -> bool:
    """Return whether an attention module with a spec split C into (..., heads, K)."""
    owner = ctx.attention_owner(plane)
    return (
        owner is not None
        and owner.spec is not None
        and len(dims) > 1
        and plane.shape[dims[-2]] == owner.num_heads > 1
    )


@register_rule('Permute')
def permute(ctx: Context, operands: Operands) -> Value:
    """Reorder dimensions."""
    value = ctx.known(operands[0])
    dims = ctx.saved('dims')
    return ctx.value([p.permute(dims) for p in value.planes], like=value)


@register_rule('Transpose')
def transpose(ctx: Context, operands: Operands) -> Value:
    """Swap two dimensions."""
    value = ctx.known(operands[0])
    dims = ctx.saved('dim0'), ctx.saved('dim1')
    return ctx.value([p.transpose(*dims) for p in value.planes], like=value)


@register_rule('T')
def matrix_transpose(ctx: Context, operands: Operands) -> Value:
    """Swap the dimensions of a matrix."""
    value = ctx.known(operands[0])
    return ctx.value([p.t() for p in value.planes], like=value)


@register_rule('ChannelShuffle')
def channel_shuffle(ctx: Context, operands: Operands) -> Value:
    """Deal channels out among a fixed number of groups, each of which loses as many."""
    value, groups = ctx.known(operands[0]), ctx.saved('groups')
    planes = []
    for plane in value.planes:
        if 1 in varying(plane):
            parts = plane.unflatten(1, (groups, -1))
            rows = ctx.merge(parts, 1).expand_as(parts)
            plane = rows.transpose(1, 2).flatten(1, 2)
        planes.append(plane)
    return ctx.value(planes, like=value)


@register_rule('AsStrided')
def as_strided(ctx: Context, operands: Operands) -> Value:
    """Give a mean over all positions another memory format, as pooling does."""
    value = ctx.known(operands[0])
    if not keeps_elements(ctx):
        ctx.freeze_value(value, 'seen through strides that the graph does not show by')
        return Value(ctx.shape)
    return ctx.value(value.planes, like=value)


def keeps_elements(ctx: Context) -> bool:
    """Return whether ``as_strided`` leaves all elements where they are.

    That is certain where it reads a fresh result, which is contiguous: a mean of shape
    (N, C, 1, 1), as `nn.AdaptiveAvgPool2d` computes it for channels_last.
    """
    node, output = ctx.node.next_functions[0]
    size, stride = ctx.saved('size'), ctx.saved('stride')
    return (
        node is not None
        and op_name(node) in ('Mean', 'Sum')
        and tuple(node._input_metadata[output].shape) == size == ctx.shape
        and all(length == 1 for length in size[2:])
        and tuple(stride[:2]) == (size[1], 1)
        and not ctx.saved('storage_offset')
    )


@register_rule('ViewAsReal')
def view_as_real(ctx: Context, operands: Operands) -> Value:
    """Tell real and imaginary parts apart along a new dimension."""
    value = ctx.known(operands[0])
    return ctx.value([p.unsqueeze(-1) for p in value.planes], like=value)


@register_rule('ViewAsComplex')
def view_as_complex(ctx: Context, operands: Operands) -> Value:
    """Take the two of the last dimension as real and imaginary part."""
    value = ctx.known(operands[0])
    last = len(value.shape) - 1
    planes = ctx.unmixed(value.planes, {last}, 'made parts of complex numbers by')
    return ctx.value([p.squeeze(last) for p in planes], like=value)


@register_rule('Unsqueeze')
def unsqueeze(ctx: Context, operands: Operands) -> Value:
    """Add a dimension of size 1."""
    value = ctx.known(operands[0])
    dim = ctx.saved('dim')
    return ctx.value([p.unsqueeze(dim) for p in value.planes], like=value)


@register_rule('Squeeze')
def squeeze(ctx: Context, operands: Operands) -> Value:
    """Drop dimensions of size 1; which ones follows from the shapes."""
    value = ctx.known(operands[0])
    planes = [reshape_plane(p, value.shape, ctx.shape) for p in value.planes]
    return ctx.value(planes, like=value)


@register_rule('Flip')
def flip(ctx: Context, operands: Operands) -> Value:
    """Reverse dimensions."""
    value = ctx.known(operands[0])
    dims = ctx.saved('dims')
    return ctx.value([p.flip(dims) for p in value.planes], like=value)


@register_rule('Repeat')
def repeat(ctx: Context, operands: Operands) -> Value:
    """Tile dimensions."""
    value = ctx.known(operands[0])
    repeats = ctx.saved('repeats')
    planes = []
    for plane in value.planes:
        plane = plane.reshape((1,) * (len(repeats) - plane.dim()) + plane.shape)
        sizes = zip(plane.shape, repeats, strict=True)
        planes.append(plane.repeat([r if s > 1 else 1 for s, r in sizes]))
    return ctx.value(planes, like=value)
