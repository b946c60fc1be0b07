"""ONNX files of exported graphs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.export.options import INPUT, ExportOptions
from mmgfp.runtimes.base import require
from mmgfp.utils.errors import ConfigError

#: Ops that only training needs, or that do nothing.
LEFTOVERS = {'Dropout', 'Identity'}
#: Ops that stay in single precision: they count, sort or compare rather than multiply.
SINGLE_PRECISION = ['NonMaxSuppression', 'TopK', 'RoiAlign', 'Resize']


def write_onnx(
    path: Path,
    graph: nn.Module,
    image: Tensor,
    options: ExportOptions,
    metadata: dict[str, str],
) -> None:
    """Export a graph to an ONNX file.

    Args:
        path: The file.
        graph: An `ExportGraph` in eval mode.
        image: An input of the size to export.
        options: Opset, exporter, free axes and precision.
        metadata: Texts to store, by key.

    Raises:
        ConfigError: If the exporter cannot do it, or leaves ops of training behind.
    """
    onnx = require('onnx', 'onnx')
    shared = _arguments(graph, options)
    with warnings.catch_warnings(), torch.no_grad():
        # Of tracing: sizes that are fixed on purpose.
        warnings.simplefilter('ignore')
        try:
            torch.onnx.export(graph, (image,), str(path), **shared)
        except Exception as error:  # exporters raise many kinds
            reason = f'{type(error).__name__}: {str(error).strip()[:300]}'
            other = 'leave --dynamo out' if options.dynamo else 'try --dynamo'
            raise ConfigError(
                'the graph', 'one that torch.onnx can export', reason, other
            ) from error
    model = onnx.load(str(path))
    drop_identities(model.graph)
    check_folded(model.graph)
    if options.fp16:
        model = _halved(model)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _arguments(graph: nn.Module, options: ExportOptions) -> dict[str, Any]:
    """Return the arguments of the exporter that is asked for."""
    axes = options.free_axes()
    shared: dict[str, Any] = dict(
        input_names=[INPUT],
        output_names=list(graph.outputs),  # type: ignore[arg-type]
        opset_version=options.opset,
    )
    if options.dynamo:
        require('onnxscript', 'onnx')
        free = {axis: torch.export.Dim.DYNAMIC for axis in axes}
        shared |= dict(dynamo=True, external_data=False, verbose=False)
        shared |= dict(dynamic_shapes=(free,)) if free else {}
    else:
        free_names = {INPUT: axes}
        if 0 in axes:
            names: Any = graph.outputs
            free_names |= {name: {0: axes[0]} for name in names}
        shared |= dict(dynamo=False, dynamic_axes=free_names if axes else None)
    return shared


def drop_identities(graph: Any) -> None:
    """Connect what reads an ``Identity`` of an ONNX graph to what it reads, in place.

    Those behind an output of the graph stay under its name, and those in the bodies of
    loops and branches as they are.
    """
    outputs = {value.name for value in graph.output}
    given = {value.name for value in graph.initializer}
    given |= {value.name for value in graph.input}
    sources: dict[str, str] = {}
    for node in [n for n in graph.node if n.op_type == 'Identity']:
        (source,), (result,) = node.input, node.output
        source = sources.get(source, source)
        if result not in outputs:
            sources[result] = source
        elif source in given | outputs:
            continue  # two names for one value: a node has to copy it
        else:
            # The output's name moves to the node that makes the value.
            sources[source] = result
            _rename_results(graph.node, source, result)
        graph.node.remove(node)
    for node in graph.node:
        _rename_reads(node, sources)


def _rename_results(nodes: Any, old: str, new: str) -> None:
    for node in nodes:
        for i, name in enumerate(node.output):
            if name == old:
                node.output[i] = new


def _rename_reads(node: Any, names: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        while name in names:
            name = names[name]
        node.input[i] = name
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            for child in inner.node:
                _rename_reads(child, names)


def check_folded(graph: Any) -> None:
    """Check that nothing of training is left in an ONNX graph.

    Raises:
        ConfigError: If there is a batch norm behind a convolution, dropout or an op
            that does nothing.
    """
    makers = {name: node.op_type for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    left = sorted(
        f'{node.op_type} {node.name}'.strip()
        for node in graph.node
        if (node.op_type in LEFTOVERS and node.output[0] not in outputs)
        or (
            node.op_type == 'BatchNormalization'
            and makers.get(node.input[0]) in ('Conv', 'ConvTranspose')
        )
    )
    if left:
        raise ConfigError(
            'the ONNX graph',
            'free of training: batch norm folded, no dropout, no identities',
            ', '.join(left)[:200],
            'export with the other exporter (--dynamo)',
        )


def _halved(model: Any) -> Any:
    require('onnxruntime', 'onnx')
    from onnxruntime.transformers import float16, onnx_model

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *SINGLE_PRECISION]
    halved = float16.convert_float_to_float16(
        model, keep_io_types=True, op_block_list=sorted(set(blocked))
    )
    # The casts it adds come last, but an ONNX graph is in the order of running.
    wrapper = onnx_model.OnnxModel(halved)
    wrapper.topological_sort()
    return wrapper.model
