"""The image that each row of a tensor belongs to, read off its autograd graph.

In the second stage of a detector the rows of a tensor are RoIs, and a pooling op has
saved which image each of them lies in (paper, section 3.2). The graph tells this
exactly, also for RoIs that are sampled, shuffled or joined, and for windows that are
cut out of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.tracing.labels import LabelTable
from mmgfp.tracing.registry import ROW_RULES
from mmgfp.tracing.row_rules import ASIDE_OPS, same
from mmgfp.tracing.row_values import Aside, Lost, Rows, RowState
from mmgfp.tracing.value import Context, op_name

#: The key under which autograd nodes remember the rows of their results.
KEY = 'mmgfp_rows'
#: The same for the input of a checkpointed part.
GIVEN = 'mmgfp_given_rows'
_UNUSED = LabelTable()  # rows need no labels


def rows_of(x: Tensor) -> Rows | Lost:
    """Return the images that the rows of ``x`` belong to.

    Args:
        x: A tensor with its graph. One that needs no gradient is taken for images.

    Examples:
        >>> images = torch.ones(3, 2, requires_grad=True) * 1
        >>> rows_of(images[[2, 0, 0]])
        Rows(images=3, index=tensor([2, 0, 0]), pooled=False)
        >>> rows_of(images.sum(0))
        Lost(reason='its input depends on no image')
    """
    root: Any = x.grad_fn
    if root is None:
        return _of_leaf(x)
    rows = _follow(root, x.output_nr)
    return Lost('its input depends on no image') if rows is None else rows


def rows_read(layer: nn.Module, x: Tensor) -> Rows | Lost:
    """Return the images of the rows that ``layer`` reads from ``x``.

    A fully connected layer reads rows along any dimension but the last one, as in
    sequences (L, N, C).
    """
    rows = rows_of(x)
    if isinstance(rows, Aside):
        is_followed = isinstance(layer, nn.Linear) and rows.dim < x.dim() - 1
        return rows if is_followed else Lost(rows.reason)
    return rows


def rows_of_operand(node: Any, position: int) -> Rows | Lost:
    """Return the images that the rows of a node's operand belong to."""
    rows = _follow_edge(*node.next_functions[position])
    return Lost('its input depends on no image') if rows is None else rows


def _follow_edge(node: Any, output: int) -> RowState:
    if node is None or hasattr(node, 'variable'):
        return None if node is None else _known((node, output))
    return _follow(node, output)


def _follow(root: Any, output: int) -> RowState:
    """Evaluate row rules below ``root``; nodes remember results for the next walk."""
    for node in _unknown_below(root):
        operands = [_known(edge) for edge in node.next_functions]
        shapes = [tuple(m.shape) for m in node._input_metadata]
        ctx = Context(_UNUSED, node, shapes, {})
        if ctx.op not in ASIDE_OPS:
            operands = [Lost(o.reason) if isinstance(o, Aside) else o for o in operands]
        result = ROW_RULES.get(ctx.op, same)(ctx, operands)
        several = isinstance(result, list)
        node.metadata[KEY] = result if several else [result] * len(shapes)
    return root.metadata[KEY][output]


def _of_leaf(x: Tensor) -> Rows | Lost:
    """Return the rows of a tensor without a graph: images, as a rule.

    A checkpointed part that backward runs again gets its input detached from the graph;
    its rows are those of the input of the part's node.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None or op_name(node) != 'CheckpointFunction':
        return Rows(len(x))
    if GIVEN not in node.metadata:
        # This stands for parts inside of parts, which lead back here, and for several
        # operands, of which any may be `x`.
        node.metadata[GIVEN] = Lost('checkpointing hides where its rows come from')
        edges = [(n, i) for n, i in node.next_functions if n is not None]
        if len(edges) == 1 and _counts(*edges[0]):
            node.metadata[GIVEN] = _follow(*edges[0]) or node.metadata[GIVEN]
    return node.metadata[GIVEN]


def mark_rows(x: Tensor, rows: Rows | Lost) -> None:
    """Let the walks of `rows_of` end at ``x``, beside which its rows then lie."""
    node: Any = x.grad_fn
    if isinstance(rows, Rows) and rows.index is not None:
        rows = rows.moved(rows.index.to(x.device))
    node.metadata[KEY] = [rows]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, whether it has a name there or not."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_input(
    x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another first one."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    return args, {**kwargs, next(iter(kwargs)): x}


def mark_output(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    rows_read: Callable[[int], Rows | Lost] = Rows,
) -> None:
    """Mark the rows of a layer that reads images itself, in a forward hook.

    Args:
        args: What the layer was called with.
        kwargs: The same by name.
        output: What it returned.
        rows_read: Tells which rows it read from their number.
    """
    x = layer_input(args, kwargs)
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
        return
    if x.grad_fn is None and output.grad_fn is not None and len(output) == len(x):
        mark_rows(output, rows_read(len(x)))


def _unknown_below(root: Any) -> Iterator[Any]:
    """Yield nodes without an entry on the way down from ``root``, operands first."""
    stack, opened = [(root, False)], set()
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in opened and KEY not in node.metadata:
            opened.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, i in node.next_functions if _counts(n, i)]


def _counts(node: Any, output: int) -> bool:
    """Return whether an operand can hold rows: it is no constant, leaf or scalar."""
    return (
        node is not None
        and not hasattr(node, 'variable')
        and len(node._input_metadata[output].shape) > 0
    )


def _known(edge: tuple[Any, int]) -> RowState:
    """Return the rows of an operand whose node has been evaluated, or of a leaf."""
    node, output = edge
    if hasattr(node, 'variable'):
        leaf = node.variable
        is_input = leaf.dim() > 0 and not isinstance(leaf, nn.Parameter)
        return _of_leaf(leaf) if is_input else None
    return node.metadata[KEY][output] if _counts(node, output) else None
