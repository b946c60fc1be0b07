"""From a loss to the labels of every parameter dimension."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.tracing.attention import attention_owners
from mmgfp.tracing.averaged_copies import averaged_copy_tensors, couple_averaged_copies
from mmgfp.tracing.buffers import KEY, buffer_name, channel_dim
from mmgfp.tracing.graph import Graph, Node, read_graph
from mmgfp.tracing.labels import LabelTable, varying
from mmgfp.tracing.rules import LABEL_RULES
from mmgfp.tracing.splits import Readings, Splits, with_loose_splits
from mmgfp.tracing.value import Context, LayerCall, Value, op_name, planes_of
from mmgfp.tracing.widths import Outputs, width_labels
from mmgfp.utils.errors import TraceError
from mmgfp.utils.trial_runs import FrozenParameters


@dataclass(frozen=True)
class Trace:
    """Labels of a model's tensors, as one pass over the graph relates them.

    Attributes:
        table: Labels of all tensor dimensions, and what is known about them.
        calls: Calls of layers, in order.
        shapes: Shapes of the model's parameters and buffers, by name.
        unknown_ops: Ops without a rule, with the layers whose outputs they froze.
        widths: Labels of the channels that a module's attribute counts, (C,) for
            each tensor that has them, by the attribute's name.
        splits: Channels that code splits into several dimensions, and how it was read.
    """

    table: LabelTable
    calls: list[LayerCall]
    shapes: dict[str, tuple[int, ...]]
    unknown_ops: dict[str, list[str]] = field(default_factory=dict)
    widths: dict[str, list[Tensor]] = field(default_factory=dict)
    splits: Splits = field(default_factory=Splits)


def trace_loss(
    model: nn.Module,
    loss: Tensor,
    strict: bool = False,
    widths: Mapping[str, Outputs] | None = None,
    unused: Iterable[Tensor] = (),
    readings: Readings = MappingProxyType({}),
    frozen: FrozenParameters | None = None,
) -> Trace:
    """Label every parameter dimension that takes part in ``loss``.

    Args:
        model: The module whose parameters and buffers get labels.
        loss: A scalar with its autograd graph, computed from a real batch.
        strict: Raise at an op without a rule instead of freezing what it reads.
        widths: The tensors that `watch_widths` collected while the loss was computed.
        unused: Tensors that the model computed beside the loss; their layers are
            labelled as well, since they read channels.
        readings: How to read splits of channels; all others are read so that some of
            their channels may go.
        frozen: Parameters that need no gradient as they were before, which tell
            averaged copies that the model's own code updates.

    Raises:
        TraceError: If the loss has no graph, or under ``strict`` an op has no rule.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        >>> trace = trace_loss(net, net(torch.ones(1, 3, 8, 8)).sum())
        >>> [call.weight for call in trace.calls]
        ['0.weight', '1.weight']
        >>> trace.table.vectors['0.weight', 0].tolist()
        [0, 1, 2, 3]
        >>> trace.calls[1].inputs.tolist()
        [0, 1, 2, 3]
    """
    if loss.grad_fn is None:
        raise TraceError(
            'loss',
            'a tensor with an autograd graph',
            'one without',
            'compute it with gradients enabled and from parameters that require them',
        )
    graph = read_graph(loss, unused)
    copies = averaged_copy_tensors(model, frozen)
    trace = partial(_trace_graph, model, graph, strict, widths or {}, copies)
    # Labels are on the CPU, whatever the model's device and torch's default one.
    with torch.device('cpu'):
        return with_loose_splits(trace, readings)


def _trace_graph(
    model: nn.Module,
    graph: Graph,
    strict: bool,
    widths: Mapping[str, Outputs],
    copies: dict[str, list[str]],
    readings: Readings,
) -> Trace:
    trace = _Tracer(model, strict, readings).run(graph, widths, copies)
    narrowed = _inseparable(trace)
    # Labels are only ever equated, never told apart again: hence a second pass.
    if not narrowed:
        return trace
    return _Tracer(model, strict, readings, narrowed).run(graph, widths, copies)


def _inseparable(trace: Trace) -> frozenset[str]:
    """Return the weights of group convs whose conv groups could only go all together.

    That is so where a network joins them again, as split attention does. They are
    traced anew, so that all conv groups stay and each loses the same channels.
    """
    components = trace.table.components()
    weights = set()
    for call in trace.calls:
        if call.groups > 1 and not call.transposed and trace.shapes[call.weight][1] > 1:
            rows = trace.table.vectors.get((call.weight, 0))
            if rows is not None and len(np.unique(components[rows.numpy()])) == 1:
                weights.add(call.weight)
    return frozenset(weights)


class _Tracer:
    """Evaluates rules over the graph, operands first."""

    def __init__(
        self,
        model: nn.Module,
        strict: bool,
        readings: Readings,
        narrowed: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.table = LabelTable()
        self.calls: list[LayerCall] = []
        self.unknown_ops: dict[str, list[str]] = {}
        self.strict = strict
        self.narrowed = narrowed
        self.splits = Splits(readings)
        self.attention_owners = attention_owners(model)
        self.parameters = {id(p): n for n, p in model.named_parameters()}
        # Buffers are not in the graph; tensors that nodes saved share their memory.
        self.buffers = {b.data_ptr(): n for n, b in model.named_buffers() if b.numel()}
        self.shapes = {n: tuple(t.shape) for n, t in _tensors(model).items()}

    def run(
        self,
        graph: Graph,
        widths: Mapping[str, Outputs],
        copies: dict[str, list[str]],
    ) -> Trace:
        values: dict[Node, list[Value]] = {}
        for node in graph.nodes:
            operands = [
                None if source is None else values[source][output]
                for source, output in graph.edges[node]
            ]
            if node in graph.relevant:
                values[node] = self._evaluate(node, operands)
            else:
                if node in graph.live and node not in graph.penalties:
                    self._freeze_outputs(operands)
                shapes = [tuple(m.shape) for m in node._input_metadata]
                values[node] = [Value(s) for s in shapes]
        self._freeze_recurrent()
        couple_averaged_copies(self.table, copies)
        counted = width_labels(self.model, widths, values)
        return Trace(
            self.table,
            self.calls,
            self.shapes,
            self.unknown_ops,
            counted,
            self.splits,
        )

    def _evaluate(self, node: Node, operands: list[Value | None]) -> list[Value]:
        if hasattr(node, 'variable'):
            return [self._leaf(node.variable)]
        shapes = [tuple(m.shape) for m in node._input_metadata]
        ctx = Context(
            self.table,
            node,
            shapes,
            self.buffers,
            self.calls,
            self.narrowed,
            self.attention_owners,
            self.splits,
        )
        rule = LABEL_RULES.get(op_name(node))
        if rule is None:
            self._freeze_unknown(op_name(node), operands)
            return [Value(s) for s in shapes]
        result = rule(ctx, operands)
        self._tie_buffers(node, result)
        if isinstance(result, Value):
            # Further outputs, such as a pool's indices, are for backward alone.
            return [result] + [Value(s) for s in shapes[1:]]
        return result

    def _tie_buffers(self, node: Node, result: Value | list[Value]) -> None:
        """Let the buffers of a norm follow the channels of its result."""
        names = node.metadata.get(KEY, ())
        for plane in result.planes if names and isinstance(result, Value) else ():
            for name in names:
                if varying(plane) == {1} and self.shapes.get(name) == plane.shape[1:2]:
                    vector = self.table.vector(name, 0, plane.shape[1])
                    self.table.equate(plane.reshape(-1), vector)

    def _leaf(self, tensor: Tensor) -> Value:
        """Label a parameter with one plane per dimension, a buffer along its channels.

        A buffer's value counts as computed from parameters: it has no rows of images.
        """
        shape = tuple(tensor.shape)
        buffer = buffer_name(tensor)
        name = self.parameters.get(id(tensor), buffer)
        if name is None:  # a leaf that the model does not own cannot be resized
            return Value(shape)
        planes = []
        for dim, size in enumerate(shape):
            # A plane of size 1 would say that labels do not depend on the dimension;
            # a single channel could not go anyway.
            if size > 1 and (buffer is None or dim == channel_dim(shape)):
                vector = self.table.vector(name, dim, size)
                planes.append(
                    vector.reshape([-1 if d == dim else 1 for d in range(len(shape))])
                )
        return Value(shape, tuple(planes), from_parameters=True)

    def _freeze_outputs(self, operands: list[Value | None]) -> None:
        for value in operands:
            for plane in planes_of(value):
                self.table.freeze(
                    plane, 'an output: reaches the loss without a further layer'
                )

    def _freeze_recurrent(self) -> None:
        """Freeze recurrent layers, whose code relies on the widths of all gates."""
        recurrent = (nn.RNNBase, nn.RNNCellBase)
        modules = {n for n, m in self.model.named_modules() if isinstance(m, recurrent)}
        for (name, _), labels in self.table.vectors.items() if modules else ():
            module = name.rpartition('.')[0]
            if module in modules:
                what = type(self.model.get_submodule(module)).__name__
                self.table.freeze(labels, f'read or made by the recurrent layer {what}')

    def _freeze_unknown(self, op: str, operands: list[Value | None]) -> None:
        planes = [plane for value in operands for plane in planes_of(value)]
        layers = self.unknown_ops.setdefault(op, [])
        for plane in planes:
            self.table.freeze(plane, f'read by {op}, an op without a rule')
            owners = [name.rpartition('.')[0] for name in self.table.owners(plane)]
            layers += [layer for layer in owners if layer not in layers]
        if self.strict and planes:
            raise TraceError(
                f'op {op} after {", ".join(layers)} must have a rule (got none); '
                'register one in mmgfp/tracing/rules (docs/op-rules.md), call '
                'register_elementwise for one that works element by element, or trace '
                'without strict to leave these channels alone'
            )


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
