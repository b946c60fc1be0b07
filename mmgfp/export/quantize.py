"""Exported files in 8-bit integers, calibrated on images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmgfp.runtimes import open_model
from mmgfp.runtimes.base import require
from mmgfp.runtimes.open_vino import shared_core
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import atomic_write

#: Ops with weights, in ONNX and in OpenVINO.
WEIGHTED = {'Conv', 'ConvTranspose', 'Gemm', 'MatMul', 'Convolution'}
WEIGHTED |= {'GroupConvolution', 'ConvolutionBackpropData'}
#: Inputs that carry data, where the others only choose: boxes to crop, indices. What a
#: layer works on is never computed from them.
DATA_INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(('RoiAlign', 'ROIAlign', 'Slice', 'Expand', 'Tile'), (0,)),
    **dict.fromkeys(('Gather', 'GatherND', 'GatherElements', 'Reshape'), (0,)),
    **dict.fromkeys(('Resize', 'Interpolate'), (0,)),
    **dict.fromkeys(('ScatterND', 'ScatterNDUpdate'), (0, 2)),
    **dict.fromkeys(('ScatterElements', 'ScatterElementsUpdate'), (0, 2)),
    **dict.fromkeys(('Where', 'Select'), (1, 2)),
    **{kind: () for kind in ('NonMaxSuppression', 'NonZero', 'Shape', 'ShapeOf')},
}
#: How ranges of activations are found: the names in onnxruntime.
METHODS = {'minmax': 'MinMax', 'percentile': 'Percentile', 'entropy': 'Entropy'}


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        name: Its name, of its own.
        kind: What it does.
        reads: Names of the nodes whose data it computes with.
        weighted: Whether it has weights.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    weighted: bool


def float_nodes(nodes: Iterable[Node]) -> list[str]:
    """Return the nodes that stay in floating point: predictors and what follows them.

    These are all nodes that no layer with weights computes with: the last layers of
    heads, on whose small differences results hang, decoding of boxes, NMS. The RPN's
    are among them, as its boxes only say where to crop.
    """
    by_name = {node.name: node for node in nodes}
    feeding: set[str] = set()
    stack = [name for node in by_name.values() if node.weighted for name in node.reads]
    while stack:
        name = stack.pop()
        if name in by_name and name not in feeding:
            feeding.add(name)
            stack += by_name[name].reads
    return [name for name in by_name if name not in feeding]


def quantize_onnx(
    path: str | Path,
    out: str | Path,
    images: Sequence[np.ndarray],
    exclude: Sequence[str] | None = None,
    method: str = 'minmax',
) -> None:
    """Write an ONNX file whose layers work on 8-bit integers.

    Weights have a scale for each output channel, activations one for each tensor
    (QDQ format). Images are read one at a time.

    Args:
        path: The file in floating point; it stays as it is.
        out: The file to write.
        images: Inputs (N, C, H, W) as the file reads them, to find ranges with.
        exclude: Names of nodes that stay in floating point; `float_nodes` by default.
        method: A name in `METHODS`.

    Raises:
        ConfigError: If there are no images, or nothing that can be quantised.
    """
    _check_images(images)
    onnx = require('onnx', 'onnx')
    require('onnxruntime', 'onnx')
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        prepared, written = Path(folder, 'prepared.onnx'), Path(folder, 'int8.onnx')
        model = _prepared(path, prepared)
        nodes = onnx_nodes(model.graph)
        stays = set(float_nodes(nodes) if exclude is None else exclude)
        _check_rest([n for n in nodes if n.weighted and n.name not in stays], path)
        quantize_static(
            str(prepared),
            str(written),
            _Reader(model.graph.input[0].name, images),
            op_types_to_quantize=sorted({n.kind for n in nodes if n.name not in stays}),
            nodes_to_exclude=sorted(stays),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[METHODS[method]],
            # Ranges are found image by image, so that one is held at a time.
            extra_options={'CalibStridedMinMax': 1},
        )
        result = onnx.load(str(written))
    facts = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    onnx.helper.set_model_props(result, facts)
    atomic_write(out, lambda tmp: onnx.save(result, str(tmp)))


def quantize_openvino(
    path: str | Path,
    out: str | Path,
    images: Sequence[np.ndarray],
    exclude: Sequence[str] | None = None,
) -> None:
    """Write an OpenVINO model whose layers work on 8-bit integers.

    Args:
        path: The ``.xml`` or ``.onnx`` file in floating point; it stays as it is.
        out: The ``.xml`` file to write, with a ``.bin`` beside it.
        images: Inputs (N, C, H, W) as the file reads them.
        exclude: Names of nodes that stay in floating point; `float_nodes` with weights
            by default.

    Raises:
        ConfigError: If there are no images, or nothing that can be quantised.
    """
    _check_images(images)
    openvino = require('openvino', 'openvino')
    nncf = require('nncf', 'nncf')
    # Not its set_log_level, which silences the handlers of all loggers.
    logging.getLogger('nncf').setLevel(logging.ERROR)
    model = shared_core().read_model(str(path))
    nodes = openvino_nodes(model)
    stays = float_nodes(nodes) if exclude is None else exclude
    layers = [node.name for node in nodes if node.weighted]
    _check_rest([name for name in layers if name not in set(stays)], path)
    info = open_model(path, 'openvino').metadata
    small = nncf.quantize(
        model,
        nncf.Dataset(_OneByOne(images)),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(
            names=[name for name in layers if name in set(stays)], validate=False
        ),
    )
    for key, text in info.items():
        small.set_rt_info(text, [key])
    openvino.save_model(small, str(out), compress_to_fp16=False)


def _prepared(path: str | Path, out: Path) -> Any:
    """Write a file with folded constants, known shapes and named nodes; return it."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Not the symbolic inference, which does not know all ops.
    quant_pre_process(str(path), str(out), skip_symbolic_shape=True)
    model = onnx.load(str(out))
    _name_nodes(model.graph)
    onnx.save(model, str(out))
    return model


class _OneByOne:
    """Images of a sequence, read when they are needed and not kept."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = images

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.images[i] for i in range(len(self.images)))

    def __len__(self) -> int:
        return len(self.images)


class _Reader:
    """Calibration data as onnxruntime reads it."""

    def __init__(self, name: str, images: Sequence[np.ndarray]) -> None:
        self.name, self.images = name, images
        self.next = 0
        self.end = len(images)

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Choose the images of the next part."""
        self.next, self.end = start_index, end_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the input, None after the last image of the part."""
        if self.next >= self.end:
            return None
        self.next += 1
        return {self.name: self.images[self.next - 1]}


def onnx_nodes(graph: Any) -> list[Node]:
    """Return the nodes of an ONNX graph, which have names."""
    makers = {out: node.name for node in graph.node for out in node.output}
    weights = {value.name for value in graph.initializer}
    weights |= {n.output[0] for n in graph.node if n.op_type == 'Constant'}
    nodes = []
    for node in graph.node:
        data = _data_inputs(node.op_type, list(node.input))
        weighted = node.op_type in WEIGHTED and bool(weights.intersection(node.input))
        reads = tuple(makers[name] for name in data if name in makers)
        nodes.append(Node(node.name, node.op_type, reads, weighted))
    return nodes


def openvino_nodes(model: Any) -> list[Node]:
    """Return the nodes of an OpenVINO model."""
    nodes = []
    for op in model.get_ordered_ops():
        sources = [value.get_node() for value in op.input_values()]
        constant = [_is_constant(source) for source in sources]
        weighted = op.get_type_name() in WEIGHTED and any(constant)
        data = _data_inputs(op.get_type_name(), sources)
        reads = tuple(source.get_friendly_name() for source in data)
        nodes.append(Node(op.get_friendly_name(), op.get_type_name(), reads, weighted))
    return nodes


def _is_constant(op: Any) -> bool:
    """Return whether a node's value is the same for all inputs."""
    inputs = op.input_values()
    kind = op.get_type_name()
    return kind == 'Constant' or (
        kind != 'Parameter'
        and bool(inputs)
        and all(_is_constant(value.get_node()) for value in inputs)
    )


def _data_inputs(kind: str, inputs: Sequence[Any]) -> list[Any]:
    chosen = DATA_INPUTS.get(kind, range(len(inputs)))
    return [inputs[i] for i in chosen if i < len(inputs)]


def _name_nodes(graph: Any) -> None:
    """Give each node of an ONNX graph a name of its own, in place."""
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f'{node.name or node.op_type}_node{number}'
        seen.add(node.name)


def _check_images(images: Sequence[np.ndarray]) -> None:
    if len(images) == 0:
        raise ConfigError(
            'the calibration set',
            'at least one image',
            'none',
            'raise --calib, or name a dataset that has images',
        )


def _check_rest(layers: Sequence[Any], path: str | Path) -> None:
    if not layers:
        raise ConfigError(
            str(path),
            'a model with layers before its predictors',
            'none that can be quantised',
            'leave it in floating point',
        )
