"""Advanced indexing, and assignment by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmgfp.tracing.labels import NO_LABEL, relax, varying
from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value, planes_of


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
