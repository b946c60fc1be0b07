"""The autograd graph of a loss, in the order in which it was computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmgfp.tracing.buffers import buffer_name
from mmgfp.tracing.rules.layers import LAYER_OPS
from mmgfp.tracing.value import op_name

Node = Any
#: The operands of a node: (node that made it, which of its outputs).
Edges = tuple[tuple[Node | None, int], ...]


@dataclass(frozen=True)
class Graph:
    """Nodes of an autograd graph, operands before users.

    Attributes:
        nodes: All nodes below the loss.
        edges: Operands by node.
        relevant: Nodes from which a way leads to a layer, and the layers.
        live: Nodes that the loss depends on with a factor other than zero.
        penalties: Nodes that make a number of one parameter after another, such as
            the L1 norm of weights in the loss.
    """

    nodes: list[Node]
    edges: dict[Node, Edges]
    relevant: set[Node]
    live: set[Node]
    penalties: set[Node]


def read_graph(loss: Tensor, unused: Iterable[Tensor] = ()) -> Graph:
    """Walk the graph of ``loss``; its nodes stay valid until backward frees them.

    Args:
        loss: The root of the graph.
        unused: Tensors whose graphs are walked as well, since their layers run whether
            the loss needs them or not.
    """
    root = loss.grad_fn
    nodes, edges = _postorder([root])
    used = set(nodes)
    ends = [x.grad_fn for x in unused if x.grad_fn is not None]
    if ends:
        nodes, edges = _postorder([root, *ends])
    parametric = parametric_nodes(nodes, edges)
    layers = {
        n
        for n in nodes
        if op_name(n) in LAYER_OPS
        and any(edges[n][i][0] in parametric for i in LAYER_OPS[op_name(n)])
    }
    # What comes after the last layer is the loss, where only outputs are frozen.
    relevant = layers | (set(nodes) - used)
    live = {root}
    for node in reversed(nodes):
        if _times_zero(node):
            continue
        for operand, _ in edges[node]:
            if operand is not None:
                if node in relevant:
                    relevant.add(operand)
                if node in live:
                    live.add(operand)
    penalties = _penalties(nodes, edges, parametric)
    return Graph(nodes, edges, relevant, live, penalties)


def _postorder(roots: list[Node]) -> tuple[list[Node], dict[Node, Edges]]:
    """List all nodes below ``roots``, operands before users, and their operands."""
    nodes: list[Node] = []
    edges: dict[Node, Edges] = {}
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            nodes.append(node)
        elif node not in edges:
            edges[node] = node.next_functions
            stack.append((node, True))
            operands = [n for n, _ in edges[node] if n is not None and n not in edges]
            # The activation comes off the stack first, parameters after it.
            operands.sort(key=lambda n: hasattr(n, 'variable'))
            stack += [(n, False) for n in reversed(operands)]
    return nodes, edges


def parametric_nodes(nodes: Iterable[Node], edges: Mapping[Node, Edges]) -> set[Node]:
    """Return the nodes that depend on parameters and on nothing else in the graph.

    A layer's result is never among them: it may depend on images, which need no
    gradient and so are not in the graph. Buffers do not count as parameters, nor
    against them.
    """
    parametric: set[Node] = set()
    constant: set[Node] = set()
    for node in nodes:
        if op_name(node) in LAYER_OPS:
            continue
        if hasattr(node, 'variable'):
            is_buffer = buffer_name(node.variable) is not None
            (constant if is_buffer else parametric).add(node)
            continue
        operands = {n for n, _ in edges[node] if n is not None}
        if operands and operands <= constant:
            constant.add(node)
        elif operands and operands <= parametric | constant:
            parametric.add(node)
    return parametric


def _penalties(
    nodes: list[Node], edges: dict[Node, Edges], parametric: set[Node]
) -> set[Node]:
    """Return the nodes on the way from parameters to single numbers.

    They tie no channels, as without some of them the number is just another one. That
    holds as long as nothing else meets the parameter, be it a constant of its shape.
    """
    readers: dict[Node, list[Node]] = {}
    for node in nodes:
        for operand, _ in edges[node]:
            if operand is not None:
                readers.setdefault(operand, []).append(node)
    penalties: set[Node] = set()
    for node in reversed(nodes):  # readers before what they read
        if node not in parametric or not _reads_one(node, edges[node]):
            continue
        if not _shape(node) or all(r in penalties for r in readers.get(node, [])):
            penalties.add(node)
    return penalties


def _reads_one(node: Node, operands: Edges) -> bool:
    """Return whether a node reads one tensor, beside numbers, or joins flat ones."""
    sources = [(n, i) for n, i in operands if n is not None]
    wide = {(n, i) for n, i in sources if _shape(n, i)}
    if len(sources) < len(operands) and _number(node) is None:
        return False  # perhaps a constant of the parameter's shape
    is_flat = op_name(node) == 'Cat' and len(_shape(node)) == 1
    return len(wide) <= 1 or is_flat


def _shape(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of a node's output."""
    if hasattr(node, 'variable'):
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[output].shape)


def _times_zero(node: Node) -> bool:
    """Return whether ``node`` multiplies by 0, as losses do with unused tensors."""
    return op_name(node) == 'Mul' and _number(node) == 0.0


def _number(node: Node) -> float | None:
    """Return the number that ``node`` multiplies or divides by, if it is one."""
    # C++ code that multiplies by a number makes a node with one operand.
    if op_name(node) not in ('Mul', 'Div') or len(node.next_functions) != 2:
        return None
    (left, _), (right, _) = node.next_functions
    if (left is None) == (right is None):
        return None
    side = '_saved_other' if right is None else '_saved_self'
    factor = getattr(node, side, None)
    if factor is None or factor.dim() or factor.is_complex():
        return None
    return float(factor)
