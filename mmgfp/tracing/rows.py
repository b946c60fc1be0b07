"""The image that each row of a tensor belongs to, read off its autograd graph.

In the second stage of a detector the rows of a tensor are RoIs, and a pooling op has
saved which image each of them lies in (paper, section 3.2). The graph tells this
exactly, also for RoIs that are sampled, shuffled or joined, and for windows that are
cut out of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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


def mark_rows(x: Tensor, rows: Rows) -> None:
    """Let the walks of `rows_of` end at ``x``."""
    node: Any = x.grad_fn
    node.metadata[KEY] = [rows]


def mark_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Mark the rows of a layer that reads images itself; a forward hook."""
    x = args[0] if args else None
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
        return
    if x.grad_fn is None and output.grad_fn is not None and len(output) == len(x):
        mark_rows(output, Rows(len(x)))


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


@dataclass(frozen=True)
class LayerCalls:
    """Rows that a layer's calls were given.

    Attributes:
        rows: The rows of each call; None for a call without any.
        first: Whether the layer read a tensor that no other layer made.
    """

    rows: list[RowState] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)


@contextmanager
def watch_rows(model: nn.Module) -> Iterator[dict[str, LayerCalls]]:
    """Collect the rows that each module with a weight is called with.

    Args:
        model: The module that is about to run.

    Yields:
        dict: Calls by name of the module, filled while the model runs.
    """
    calls: dict[str, LayerCalls] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen = calls.setdefault(name, LayerCalls())
            if not torch.is_grad_enabled():
                return  # as when a sampler scores RoIs: no statistics come of it
            x = args[0] if args else None
            if isinstance(x, Tensor):
                seen.rows.append(rows_of(x) if len(x) else None)
                seen.first.append(x.grad_fn is None)
            else:
                seen.rows.append(Lost('its input is not its first argument'))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, 'weight', None), Tensor):
            handles.append(module.register_forward_pre_hook(watch(name)))
            handles.append(module.register_forward_hook(mark_output))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RowUse:
    """Layers by what their rows are; all are names of modules.

    Attributes:
        called: Layers that were called at all.
        first: Layers that read the images themselves.
        images: Layers that read one row for each image in all calls.
        rois: Layers that read RoIs in all calls.
        lost: Layers of which some rows cannot be told to images, with the reason.
    """

    called: frozenset[str] = frozenset()
    first: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    rois: frozenset[str] = frozenset()
    lost: Mapping[str, str] = field(default_factory=dict)


def judge_rows(calls: Mapping[str, LayerCalls]) -> RowUse:
    """Sum up the calls that `watch_rows` collected.

    The first layer with known rows says how many images there are.
    """
    states = {n: [r for r in c.rows if r is not None] for n, c in calls.items()}
    every = [r for rows in states.values() for r in rows]
    count = next((r.images for r in every if isinstance(r, Rows)), 0)
    lost = {
        name: r.reason if isinstance(r, Lost) else f'{r.images} images, not {count}'
        for name, rows in states.items()
        for r in rows
        if isinstance(r, Lost) or r.images != count
    }
    known = {
        name: [r for r in rows if isinstance(r, Rows)]
        for name, rows in states.items()
        if rows and name not in lost
    }
    return RowUse(
        frozenset(calls),
        frozenset(n for n, c in calls.items() if any(c.first)),
        frozenset(n for n, c in known.items() if all(r.index is None for r in c)),
        frozenset(n for n, c in known.items() if all(r.pooled for r in c)),
        lost,
    )
