"""ONNX graphs in which each node says which layer its time belongs to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.runtimes.base import require

#: Ops of layers, in ONNX and in runtimes that fuse them with what follows.
LAYER_OPS = re.compile('(Conv|Gemm|MatMul|FullyConnected|Deconvolution)', re.IGNORECASE)
OPSET = 17


def export_marked(
    module: nn.Module, inputs: Sequence[Tensor], path: Path
) -> dict[int, tuple[str, ...]]:
    """Write an ONNX file whose nodes and tensors carry the number of their node.

    Args:
        module: The module, in eval mode.
        inputs: What it is called with.
        path: The file.

    Returns:
        dict: By the number of each node the weights of the layers that it belongs to:
        its own, or those of the layers before it. The names that runtimes give to fused
        nodes are made of names of the nodes or of their outputs; `node_number` finds
        the number in them.
    """
    onnx = require('onnx', 'onnx')
    names = [f'input{i}' for i in range(len(inputs))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            module,
            tuple(inputs),
            str(path),
            input_names=names,
            opset_version=OPSET,
            dynamo=False,
            # Weights keep their names; runtimes fold norms and constants themselves.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    model = onnx.load(str(path))
    owners = mark(model.graph, {n for n, _ in module.named_parameters()})
    onnx.save(model, str(path))
    return owners


def mark(graph: Any, parameters: set[str]) -> dict[int, tuple[str, ...]]:
    """Name nodes and tensors of a graph by numbers, in place; see `export_marked`."""
    source: dict[str, str] = {n: n for n in parameters}  # tensors that are a parameter
    layers: dict[str, tuple[str, ...]] = {}  # layers before each tensor
    owners: dict[int, tuple[str, ...]] = {}
    renamed: dict[str, str] = {}
    for i, node in enumerate(graph.node):
        reads = [*node.input, *_outer_names(node)]
        weights = [source[n] for n in reads if n in source]
        if node.op_type in ('Transpose', 'Identity') and weights:
            source[node.output[0]] = weights[0]
        is_layer = bool(LAYER_OPS.search(node.op_type)) and bool(weights)
        before = dict.fromkeys(w for n in reads for w in layers.get(n, ()))
        owners[i] = (weights[0],) if is_layer else tuple(before)
        for name in node.output:
            layers[name] = owners[i]
            renamed[name] = f'@{i}@{len(renamed)}'
        node.name = f'@{i}@'
    for node in graph.node:
        node.input[:] = [renamed.get(n, n) for n in node.input]
        node.output[:] = [renamed.get(n, n) for n in node.output]
    for output in graph.output:
        output.name = renamed.get(output.name, output.name)
    del graph.value_info[:]
    return owners


def _outer_names(node: Any) -> list[str]:
    """Return names that the bodies of a node, as of an If, may read from outside."""
    bodies = [a.g for a in node.attribute if a.g.node]
    return [name for body in bodies for inner in body.node for name in inner.input]


def node_number(name: str) -> int | None:
    """Return the number of the node that a runtime's name for a node contains.

    Examples:
        >>> node_number('@12@7_nchwc'), node_number('ReorderOutput')
        (12, None)
    """
    match = re.search(r'@(\d+)@', name)
    return int(match[1]) if match else None


def times_of_layers(
    events: Iterable[tuple[str, str, float]], owners: Mapping[int, Sequence[str]]
) -> dict[str, float]:
    """Add up the times of nodes by the layers that they belong to.

    Args:
        events: Name, op and time of each node that ran, in order.
        owners: What `export_marked` returned.

    Returns:
        dict: Times by the weight's name. What runs before the first layer is the
        first one's; nodes without a number go with the one before.
    """
    events = list(events)
    numbers = [node_number(name) for name, _, _ in events]
    seen = {owners[i][0] for i in numbers if i is not None and len(owners[i]) == 1}
    times: dict[str, float] = {}
    pending, last = 0.0, None
    for (_, op, time), number in zip(events, numbers, strict=True):
        owner = _owner(op, owners.get(-1 if number is None else number, ()), seen)
        last = owner or last
        if last is None:
            pending += time
            continue
        times[last] = times.get(last, 0.0) + time + pending
        pending = 0.0
    return times


def _owner(op: str, candidates: Sequence[str], seen: set[str]) -> str | None:
    """Return the layer of a node: of several, where an addition is fused, the one left.

    A convolution that took over the addition after it bears the addition's name. The
    others that are added have nodes of their own.
    """
    if len(candidates) > 1 and LAYER_OPS.search(op):
        left = [name for name in candidates if name not in seen]
        if left:
            seen.add(left[-1])
            return left[-1]
    return candidates[-1] if candidates else None
