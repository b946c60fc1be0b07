"""Row rules: how each op hands the images of its rows from operands to results.

A row is an index of the first dimension. Ops that move rows are replayed on the
numbers of the images. All other ops hand on the rows of their operands as long as
their number stays. To add an op, or another source of rows beside RoI pooling, write
one function decorated with `register_row_rule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmgfp.tracing.labels import relax, varying
from mmgfp.tracing.registry import register_row_rule
from mmgfp.tracing.row_values import Aside, Lost, Rows, RowState
from mmgfp.tracing.rules.arithmetic import (
    BATCH_NORM_OPS,
    ELEMENTWISE_OPS,
    ROI_POOL_OPS,
)
from mmgfp.tracing.rules.layers import LAYER_OPS
from mmgfp.tracing.rules.reductions import REDUCTION_OPS
from mmgfp.tracing.rules.shapes import keeps_elements
from mmgfp.tracing.value import Context, reshape_plane

#: Ops that see dimensions split and joined.
VIEW_OPS = ('View', 'UnsafeView', 'ReshapeAlias', 'Squeeze', 'Unsqueeze')
#: Ops that can follow `Aside` rows, as when attention tells q, k and v apart. All
#: others are given them as lost.
ASIDE_OPS = frozenset(
    ('Permute', 'Transpose', 'T', 'Select', 'Unbind', 'NativeLayerNorm', *VIEW_OPS)
    + (*ELEMENTWISE_OPS, *BATCH_NORM_OPS, *REDUCTION_OPS)
)


def _dense(ctx: Context, rows: Rows) -> Tensor:
    """Return the image of each row, (R,), where `Rows.index` may be None."""
    if rows.index is not None:
        return rows.index
    return torch.arange(rows.images, device=_device(ctx))


def same(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Rows keep their places, as in all ops that do not say otherwise."""
    states = [o for o in operands if o is not None]
    if not states:
        return None
    if any(isinstance(o, Aside) for o in states):
        return _same_aside(ctx, states)
    fitting = [o for o in states if isinstance(o, Rows) and len(o) == _count(ctx)]
    if not fitting:
        lost = [o for o in states if isinstance(o, Lost)]
        return lost[0] if lost else Lost(f'rows are joined or split by {ctx.op}')
    first = next((o for o in fitting if o.index is not None), fitting[0])
    # As many rows need not be the same rows: as many RoIs as images, for one.
    for other in fitting:
        if other.index is not first.index and not torch.equal(
            _dense(ctx, first), _dense(ctx, other)
        ):
            return Lost(f'rows of different images are combined by {ctx.op}')
    return first


def _same_aside(ctx: Context, states: Sequence[RowState]) -> RowState:
    """Rows along another dimension keep their places; operands must agree on them."""
    first, *others = sorted(states, key=lambda o: not isinstance(o, Aside))
    assert isinstance(first, Aside)
    agree = all(
        isinstance(o, Aside)
        and o.dim == first.dim
        and torch.equal(_dense(ctx, o.rows), _dense(ctx, first.rows))
        for o in others
        if type(o) is not Lost
    )
    length = ctx.shape[first.dim] if first.dim < len(ctx.shape) else 0
    if agree and length == len(first.rows):
        return first
    return Lost(first.reason)


def _placed(ctx: Context, rows: Rows, dim: int, reason: str) -> RowState:
    """Return the state of ``rows`` that lie along ``dim`` of the first result."""
    if dim:
        return Aside(reason, rows, dim)
    in_order = len(rows) == rows.images and torch.equal(
        _dense(ctx, rows), torch.arange(rows.images, device=_device(ctx))
    )
    return replace(rows, index=None) if in_order else rows


def _device(ctx: Context) -> torch.device:
    device: torch.device = ctx.node._input_metadata[0].device
    return device


def _count(ctx: Context) -> int:
    """Return the number of rows of the first result; -1 for a scalar."""
    return ctx.shape[0] if ctx.shape else -1


def _dims(ctx: Context, *names: str) -> tuple[int, ...]:
    """Return saved dimensions of the first operand, counted from the front."""
    dims: list[int] = []
    for name in names:
        value = getattr(ctx.node, f'_saved_{name}', None)
        dims += value if isinstance(value, tuple) else () if value is None else [value]
    node, output = next(e for e in ctx.node.next_functions if e[0] is not None)
    return ctx.signed_dims(dims, len(node._input_metadata[output].shape))


@register_row_rule(*LAYER_OPS, *BATCH_NORM_OPS, 'NativeGroupNorm', 'NativeLayerNorm')
def layer(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Hand on the activation's rows; one that needs no gradient is taken for images."""
    position = LAYER_OPS.get(ctx.op, (0,))[0]
    if ctx.node.next_functions[position][0] is not None:
        state = operands[position]
        if ctx.op == 'NativeLayerNorm' and isinstance(state, Aside):
            others = len(ctx.shape) - len(ctx.saved('normalized_shape'))
            state = state if state.dim < others else Lost(state.reason)
        return same(ctx, [state])
    if len(ctx.shape) == 2:  # rows that a FC layer may have flattened
        return Lost(f'what {ctx.op} reads needs no gradient')
    return Rows(_count(ctx))


@register_row_rule(*ROI_POOL_OPS)
def pool(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Read the row of the features off each RoI; it is the first column of (R, 5)."""
    features = operands[0]
    if not isinstance(features, Rows):
        return features
    shape = (_count(ctx), 5)
    for saved in getattr(ctx.node, 'saved_tensors', ()):
        if saved.shape == shape:
            index = _dense(ctx, features)[saved[:, 0].long()]
            return Rows(features.images, index, pooled=True)
    return Lost(f'{ctx.op} does not show which image a RoI lies in')


@register_row_rule('CheckpointFunction')
def checkpoint(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Lose rows, since the graph that moved them is built in backward only."""
    return Lost('rows may be moved in a checkpointed part that it comes from')


@register_row_rule(*VIEW_OPS)
def view(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Cut rows into equal parts, or join parts of one image."""
    (rows,) = operands
    if isinstance(rows, Aside):
        return _reshaped(ctx, rows.rows, rows.dim)
    if not isinstance(rows, Rows) or len(rows) == _count(ctx):
        return rows
    before, after = len(rows), _count(ctx)
    index = _dense(ctx, rows)
    # A view keeps elements in order, so that parts of a row stay side by side.
    if before and after % before == 0:
        return rows.moved(index.repeat_interleave(after // before))
    if after > 0 and before % after == 0:
        parts = index.reshape(after, -1)  # (R', R / R')
        if bool((parts == parts[:, :1]).all()):
            return rows.moved(parts[:, 0])
    return _reshaped(ctx, rows, 0)


def _reshaped(ctx: Context, rows: Rows, dim: int) -> RowState:
    """Follow rows along ``dim`` through a view to the dimension that tells images.

    So do (N, C, ...) seen as (1, N C, ...), as instance norms see it, and (L, N, C)
    seen as (L N, C), as layers see sequences.
    """
    node, output = ctx.node.next_functions[0]
    source = tuple(node._input_metadata[output].shape)
    shape = [-1 if d == dim else 1 for d in range(len(source))]
    images = _dense(ctx, rows).reshape(shape)
    images = relax(reshape_plane(images, source, ctx.shape))
    dims, reason = varying(images), f'rows of several images are joined by {ctx.op}'
    if len(dims) != 1:
        return Lost(reason)
    (dim,) = dims
    return _placed(ctx, rows.moved(images.reshape(-1)), dim, reason)


@register_row_rule('Permute', 'Transpose', 'T')
def permute(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Follow rows to another dimension, and back."""
    (state,) = operands
    rows, dim = (state.rows, state.dim) if isinstance(state, Aside) else (state, 0)
    if not isinstance(rows, Rows):
        return state
    if ctx.op == 'Permute':
        dim = _dims(ctx, 'dims').index(dim)
    else:
        swapped = (0, 1) if ctx.op == 'T' else _dims(ctx, 'dim0', 'dim1')
        dim = swapped[1 - swapped.index(dim)] if dim in swapped else dim
    result = same(ctx, [rows]) if dim == 0 else _unless(True, ctx, [rows])
    return Aside(result.reason, rows, dim) if isinstance(result, Lost) else result


@register_row_rule('Index', 'IndexSelect', 'Slice', 'Flip', 'Repeat')
def pick(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Do to the numbers of the images what the op does to the rows."""
    rows = operands[0]
    if not isinstance(rows, Rows):
        return rows
    picked = _picked(ctx, _dense(ctx, rows))
    if picked is None:
        return same(ctx, operands)
    if picked.dim() != 1 or len(picked) != _count(ctx):
        return Lost(f'rows are moved by {ctx.op}')
    return rows.moved(picked)


def _picked(ctx: Context, index: Tensor) -> Tensor | None:
    """Return ``index`` after the op; None if it leaves the first dimension alone."""
    if ctx.op == 'Index':
        chosen = ctx.node._saved_indices[0]
        if chosen is None:
            return None
        masked = chosen.dtype == torch.bool  # maybe tokens of each image, (N, L)
        return index[chosen.nonzero()[:, 0]] if masked else _at(index, chosen)
    if ctx.op == 'Repeat':
        return index.repeat(ctx.saved('repeats')[0])
    if 0 not in _dims(ctx, 'dim', 'dims'):
        return None
    if ctx.op == 'Flip':
        return index.flip(0)
    if ctx.op == 'IndexSelect':
        return index[ctx.saved('index')]
    end = min(ctx.saved('end'), len(index))  # the largest integer is an open end
    return index[ctx.saved('start') : end : ctx.saved('step')]


def _at(index: Tensor, chosen: Tensor) -> Tensor:
    """Return ``index[chosen]``; nothing for a mask of several dimensions."""
    if chosen.dtype in (torch.bool, torch.uint8):
        return index[chosen.bool()] if chosen.dim() == 1 else index[:0]
    return index[chosen]


@register_row_rule('IndexPut', 'IndexPutImpl')
def put(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Assign rows, ``x[chosen] = values``, as when RoIs are pooled level by level."""
    base, values = operands[:2]
    chosen = ctx.node._saved_indices[0]
    if chosen is None or values is None or isinstance(base, Lost):
        return same(ctx, operands[:2])
    if isinstance(values, Lost):
        return values
    if base is None:  # a constant, such as zeros for all RoIs
        index = torch.full((_count(ctx),), -1, device=_dense(ctx, values).device)
    else:
        index = _dense(ctx, base).clone()
    places = _at(torch.arange(len(index), device=index.device), chosen)
    written = _dense(ctx, values)
    node, output = ctx.node.next_functions[1]
    if len(node._input_metadata[output].shape) < len(ctx.shape):
        # A single row came without its dimension, as torch assigns it.
        written = written[:1].expand(len(places)) if _of_one_image(written) else written
    if places.shape != written.shape:
        return Lost(f'rows are moved by {ctx.op}')
    index[places] = written
    return values.moved(index)


@register_row_rule('Cat')
def cat(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Concatenate rows of the same images."""
    if _dims(ctx, 'dim') != (0,):
        return same(ctx, operands)
    parts = [o for o in operands if isinstance(o, Rows)]
    if len(parts) != len(operands) or len({o.images for o in parts}) > 1:
        return Lost('rows are concatenated with others by Cat')
    index = torch.cat([_dense(ctx, o) for o in parts])
    return Rows(parts[0].images, index, any(o.pooled for o in parts))


@register_row_rule('Split', 'SplitWithSizes')
def split(ctx: Context, operands: Sequence[RowState]) -> RowState | list[RowState]:
    """Deal out rows to several results."""
    (rows,) = operands
    if _dims(ctx, 'dim') != (0,) or not isinstance(rows, Rows):
        return same(ctx, operands)
    sizes = [shape[0] for shape in ctx.out_shapes]
    return [rows.moved(part) for part in _dense(ctx, rows).split(sizes)]


@register_row_rule('Select', 'Unbind')
def single(ctx: Context, operands: Sequence[RowState]) -> RowState | list[RowState]:
    """Take one row; all rows of the result are then of its image."""
    rows = operands[0]
    if isinstance(rows, Aside):
        (dim,) = _dims(ctx, 'dim')
        if dim == rows.dim:
            return Lost(rows.reason)
        new_dim = rows.dim - (dim < rows.dim)
        return replace(rows, dim=new_dim) if new_dim else rows.rows
    if _dims(ctx, 'dim') != (0,) or not isinstance(rows, Rows):
        return same(ctx, operands)
    index = _dense(ctx, rows)  # one result for each row, except with Select
    if ctx.op == 'Select':
        index = index[ctx.saved('index')].reshape(1)
    return [
        rows.moved(image.expand(shape[0])) if shape else None
        for image, shape in zip(index, ctx.out_shapes, strict=True)
    ]


@register_row_rule('Stack')
def stack(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Make one row of each tensor, if all of it is of one image."""
    if _dims(ctx, 'dim') != (0,):
        return same(ctx, operands)
    parts = [o for o in operands if isinstance(o, Rows)]
    images = [_dense(ctx, o) for o in parts]
    if len(parts) == len(operands) and all(_of_one_image(i) for i in images):
        return parts[0].moved(torch.stack([i[0] for i in images]))
    return Lost('rows of several images are joined by Stack')


@register_row_rule(
    'Gather', 'Sort', 'Topk', 'Scatter', 'ScatterAdd',
    'ScatterReduce', 'IndexAdd', 'Cumsum', 'Cumprod', 'Cummax', 'Cummin', 'Softmax',
    'LogSoftmax', 'SafeSoftmax',
)  # fmt: skip
def along(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Lose rows where the op works along them."""
    return _unless(_dims(ctx, 'dim') == (0,), ctx, operands)


@register_row_rule(
    'Roll', 'Unfold', 'MaskedSelect', 'Rot90', 'Diagonal', 'FftR2C', 'FftC2R', 'FftC2C'
)
def shift(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Lose rows where they are shifted, interleaved or mixed."""
    dims = _dims(ctx, 'dims', 'dim', 'dim1', 'dim2', 'dimension')
    return _unless(not dims or 0 in dims, ctx, operands)


@register_row_rule('AsStrided')
def restride(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Keep rows where all elements stay where they are."""
    return _unless(not keeps_elements(ctx), ctx, operands)


@register_row_rule(*REDUCTION_OPS)
def reduce(ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Keep rows unless they are reduced: the result is of no single image then."""
    dims = _dims(ctx, 'dim')
    state = operands[0]
    dim = state.dim if isinstance(state, Aside) else 0
    if not dims or dim in dims:
        return None
    if not isinstance(state, Aside):
        return same(ctx, operands[:1])
    node, output = ctx.node.next_functions[0]
    kept = len(node._input_metadata[output].shape) == len(ctx.shape)
    dim -= 0 if kept else sum(d < dim for d in dims)
    return _placed(ctx, state.rows, dim, state.reason)


def _unless(moved: bool, ctx: Context, operands: Sequence[RowState]) -> RowState:
    """Keep rows unless they were ``moved``, or are all of one image in any case."""
    states = [o for o in operands if o is not None]
    if not moved or not states:
        return same(ctx, operands)
    rows = states[0]
    if len(states) == 1 and isinstance(rows, Rows):
        index = _dense(ctx, rows)
        if _of_one_image(index):  # whichever way they went
            return rows.moved(index[:1].expand(_count(ctx)))
    return Lost(f'rows are moved by {ctx.op}')


def _of_one_image(index: Tensor) -> bool:
    return len(index) > 0 and bool((index == index[0]).all())
