"""Whether a layer's weight reads what the layer is called with.

Statistics are taken off the first argument of a layer's call. That is right only where
the weight is contracted with this argument, and with nothing else; elsewhere they are
taken off the node that reads the weight, if each call of the layer leads to one. A
layer may change its input before, read it twice, or lend its weight to a function; and
a module around a layer may show the layer's weight as its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.tracing.graph import Graph, Node, parametric_nodes
from mmgfp.tracing.rules.layers import LAYER_OPS
from mmgfp.tracing.value import op_name
from mmgfp.utils.modules import weight_owners

#: Why what is measured at a layer's call is not what its weight reads.
OUTSIDE = 'its weight is also read outside of its own calls'
CHANGED = 'it changes its input, or uses it elsewhere, before its weight reads it'
IN_PLACE = 'it changes its input in place'
#: Ops that hand a factor on a channel from operand to result, and leave all channels
#: in their places: the gradient of a mask is the same before and after.
NEUTRAL_OPS = frozenset({
    'ToCopy', 'Clone', 'Alias', 'View', 'UnsafeView', 'ReshapeAlias', 'Relu',
    'LeakyRelu', 'Neg', 'NativeDropout', 'ConstantPadNd', 'Mul', 'Div',
    'ReflectionPad1D', 'ReflectionPad2D', 'ReflectionPad3D', 'ReplicationPad1D',
    'ReplicationPad2D', 'ReplicationPad3D', 'MaxPool2DWithIndices', 'AvgPool2D',
    'AdaptiveAvgPool2D', 'UpsampleNearest2D', 'UpsampleBilinear2D',
})  # fmt: skip


#: Under this name the nodes of layers keep the activation that they read.
KEPT = {'Convolution': '_saved_input', 'Addmm': '_saved_mat1', 'Mm': '_saved_self'}
#: Nodes that are looked at between a layer's output and its weight.
NEAR = 40


def find_reader(output: Node | None, weight: nn.Parameter) -> tuple[Node, int] | None:
    """Return the node by which a weight reads, and its operand, near a layer's output.

    Args:
        output: The node of the layer's output.
        weight: The layer's weight.
    """
    queue, seen = [output] if output is not None else [], {output}
    while queue and len(seen) < NEAR:
        node = queue.pop(0)
        factors = LAYER_OPS.get(op_name(node), ())
        edges = node.next_functions
        if op_name(node) in KEPT and _leads_to(edges[factors[1]][0], weight):
            return node, factors[0]
        further = {n for n, _ in edges if n is not None} - seen
        seen |= further
        queue += further
    return None


def _leads_to(root: Node | None, weight: nn.Parameter) -> bool:
    stack, seen = [root] if root is not None else [], {root}
    while stack and len(seen) < NEAR:
        node = stack.pop()
        if getattr(node, 'variable', None) is weight:
            return True
        further = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= further
        stack += further
    return False


class Alias(torch.autograd.Function):
    """A layer's input under a name of its own, which tells the layer's use of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the same memory; as it is no view, in-place ops may change it."""
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Hand the gradient on."""
        return grads[0]


class Operands:
    """The layers of a graph, and the activations that their weights read.

    Args:
        graph: The graph of a loss, with an `Alias` for each call of a layer.
        model: Its module.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.edges = graph.edges
        self.parametric = parametric_nodes(graph.nodes, graph.edges)
        self.users: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for operand in dict.fromkeys(n for n, _ in graph.edges[node]):
                if operand is not None:
                    self.users[operand].append(node)
        #: Nodes that contract each weight with an activation that has a history.
        self.readers: dict[str, set[Node]] = defaultdict(set)
        self._activations: dict[Node, int] = {}
        for node in graph.nodes:
            self._add_reader(node)

    def _add_reader(self, node: Node) -> None:
        factors = LAYER_OPS.get(op_name(node), ())
        operands = [self.edges[node][i][0] for i in factors]
        weights = [n for n in operands if n in self.parametric]
        if not weights or len(weights) == len(factors):
            return
        position = next(i for i, n in enumerate(operands) if n not in self.parametric)
        if operands[position] is None:  # images, whose channels stay in any case
            return
        self._activations[node] = factors[position]
        for weight in weights:
            for name in self._leaves(weight):
                self.readers[name].add(node)

    def _leaves(self, root: Node) -> set[str]:
        """Return the parameters that a weight is computed from."""
        stack, seen, names = [root], {root}, set()
        while stack:
            node = stack.pop()
            if hasattr(node, 'variable') and id(node.variable) in self.names:
                names.add(self.names[id(node.variable)])
            operands = {n for n, _ in self.edges[node] if n is not None} - seen
            seen |= operands
            stack += operands
        return names

    def read(self, call: Node, weight: str) -> tuple[set[Node], bool]:
        """Return the nodes by which a call's input meets the weight.

        Args:
            call: The `Alias` of the call's input.
            weight: Name of the weight.

        Returns:
            tuple: The nodes, and whether nothing else depends on the input.
        """
        met: set[Node] = set()
        is_clean, stack = True, [(call, user) for user in self.users[call]]
        while stack:
            node, user = stack.pop()
            if user in self.readers[weight] and self._reads(user, node, call):
                met.add(user)
            elif op_name(user) == 'Alias' and node is call:
                continue  # a layer inside of this one, which is watched as well
            elif self._is_neutral(user, call):
                stack += [(user, further) for further in self.users[user]]
            else:
                is_clean = False
        return met, is_clean

    def _reads(self, reader: Node, operand: Node, call: Node) -> bool:
        """Return whether ``operand`` is the activation, with the call's channels."""
        edges = self.edges[reader]
        places = [i for i, (n, _) in enumerate(edges) if n is operand]
        is_conv = op_name(reader) not in ('Addmm', 'Mm')
        same_rank = len(_shape(operand)) == len(_shape(call))
        return places == [self._activations[reader]] and (same_rank or not is_conv)

    def _is_neutral(self, node: Node, call: Node) -> bool:
        name, before, after = op_name(node), _shape(call), _shape(node)
        if name not in NEUTRAL_OPS or not before or not after:
            return False
        if name in ('Mul', 'Div'):
            others = self.edges[node][1:]
            if any(n is not None and n not in self.parametric for n, _ in others):
                return False
        # Images keep their channels in place, and so do tokens.
        return after[:2] == before[:2] or after[-1] == before[-1]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


@dataclass(frozen=True)
class OperandUse:
    """Modules by how they read their input; all are names.

    Attributes:
        aside: Those with a weight that is read by another one's call.
        inside: Those whose weight reads something else than their input, each time
            they are called, where the graph shows it.
        last: Those whose channels lie along the last dimension.
        reasons: Why others cannot be measured.
    """

    aside: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CallNodes:
    """Nodes of a module's calls.

    Attributes:
        inputs: The `Alias` of each call's input, where it has a history.
        outputs: The node of each call's output.
        in_place: Whether a call changed its input in place.
    """

    inputs: Sequence[Node]
    outputs: Sequence[Node]
    in_place: bool = False


def judge_operands(
    graph: Graph, model: nn.Module, calls: Mapping[str, CallNodes]
) -> OperandUse:
    """Compare what layers are called with to what their weights read.

    Args:
        graph: The graph of a loss.
        model: Its module.
        calls: The calls by the name of the module.
    """
    operands = Operands(graph, model)
    parameters = dict(model.named_parameters())
    aside: set[str] = set()
    inside: set[str] = set()
    last: set[str] = set()
    reasons: dict[str, str] = {}
    for weight, owners in weight_owners(model).items():
        readers = operands.readers.get(weight)
        called = [m for m in owners if m in calls]
        if not readers or not called:
            continue
        if any(op_name(node) in ('Addmm', 'Mm') for node in readers):
            last.update(called)
        problems, idle = _judge_calls(operands, weight, called, calls)
        if problems and _is_read_inside(readers, parameters[weight], called, calls):
            inside.update(called)
            continue
        reasons |= problems
        aside |= idle
    return OperandUse(frozenset(aside), frozenset(inside), frozenset(last), reasons)


def _judge_calls(
    operands: Operands,
    weight: str,
    called: Sequence[str],
    calls: Mapping[str, CallNodes],
) -> tuple[dict[str, str], set[str]]:
    """Return what is wrong with calls, and modules that do not read the weight."""
    idle: set[str] = set()
    reasons: dict[str, str] = {}
    missing = set(operands.readers[weight])
    for module in called:
        nodes = [n for n in calls[module].inputs if n not in operands.parametric]
        read = [operands.read(node, weight) for node in nodes]
        met = [node for nodes, _ in read for node in nodes]
        if not met:
            idle.add(module)
            continue
        if calls[module].in_place:
            reasons[module] = IN_PLACE
        elif len(met) > len(set(met)) or not all(clean for _, clean in read):
            reasons[module] = CHANGED
        missing -= set(met)
    if missing:
        none = len(operands.readers[weight]) == len(missing)
        alone = len(called) == 1 and bool(calls[called[0]].inputs)
        return dict.fromkeys(called, CHANGED if none and alone else OUTSIDE), set()
    return reasons, idle


def _is_read_inside(
    readers: set[Node],
    weight: nn.Parameter,
    called: Sequence[str],
    calls: Mapping[str, CallNodes],
) -> bool:
    """Return whether each call of a single module shows one reading of its weight."""
    if len(called) > 1:
        return False
    found = [find_reader(node, weight) for node in calls[called[0]].outputs]
    nodes = [f[0] for f in found if f is not None]
    return len(nodes) == len(found) == len(readers) and set(nodes) == readers
