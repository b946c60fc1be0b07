"""Ops that move elements: the real torch function is replayed on the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgfp.tracing.labels import NO_LABEL, relax, varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.splits import Split
from mmgfp.tracing.value import (
    Context,
    Shape,
    Value,
    blocks,
    op_name,
    planes_of,
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


@register_rule('Index')
def index(ctx: Context, operands: Operands) -> Value:
    """Advanced indexing, ``x[indices]``."""
    value = ctx.known(operands[0])
    indices = _cpu_indices(ctx)
    dims = _indexed_dims(indices)
    planes = []
    for plane in value.planes:
        if not varying(plane) & dims:
            # Whichever elements are taken, their labels are those of the first ones.
            planes.append(plane[_first_elements(indices)])
            continue
        # Indexed dimensions are written out, the others stay as they are.
        sizes = [s if d in dims else plane.shape[d] for d, s in enumerate(value.shape)]
        result = plane.expand(sizes)[indices]
        planes.append(relax(result) if result.numel() else result)
    return ctx.value([p for p in planes if p.numel()], like=value)


@register_rule('IndexPut', 'IndexPutImpl')
def index_put(ctx: Context, operands: Operands) -> Value:
    """Assignment, ``x[indices] = values``."""
    base, values = operands
    indices = _cpu_indices(ctx)
    if values is None:
        ctx.freeze_value(base, 'partly overwritten by')
        return Value(ctx.shape)
    shape = ctx.shape
    dims = _indexed_dims(indices)
    planes = []
    for plane in values.planes:
        # Dimensions of `values` count from the back, as for broadcasting.
        offset = len(shape) - len(values.shape)
        labelled = {d + offset for d in varying(plane)}
        sizes = [n if d in dims | labelled else 1 for d, n in enumerate(shape)]
        result = torch.full(sizes, NO_LABEL)
        for other in planes_of(base):
            if varying(other) & labelled:
                result = torch.broadcast_to(other, sizes).clone()
        result[indices] = plane
        planes.append(result)
    if base is not None and base.planes and not planes:
        ctx.freeze_value(base, 'partly overwritten by')
    return ctx.value(planes, like=Value(shape))


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


def _cpu_indices(ctx: Context) -> tuple[Tensor | slice, ...]:
    """Return the node's indices; labels are on the CPU wherever the model is."""
    return tuple(slice(None) if i is None else i.cpu() for i in ctx.node._saved_indices)


def _first_elements(indices: Sequence[Tensor | slice]) -> tuple[Tensor | slice, ...]:
    """Return indices of the same ranks that take one element each."""
    first: list[Tensor | slice] = []
    for i in indices:
        if isinstance(i, slice):
            first.append(i)
        elif i.dtype == torch.bool:
            first += [torch.zeros(1, dtype=torch.int64)] * i.dim()
        else:
            first.append(torch.zeros((1,) * i.dim(), dtype=torch.int64))
    return tuple(first)


def _indexed_dims(indices: tuple[Tensor | slice, ...]) -> set[int]:
    """Return the dimensions that advanced indices address; a mask may have several."""
    dims: set[int] = set()
    d = 0
    for i in indices:
        width = i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        if isinstance(i, Tensor):
            dims |= set(range(d, d + width))
        d += width
    return dims
