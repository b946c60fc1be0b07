"""An export graph as an ONNX file of fixed sizes, as needed to time or quantise it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from mmgfp.export.graphs import ExportGraph
from mmgfp.runtimes.base import require


def write_plain_onnx(
    graph: ExportGraph, image: torch.Tensor, path: Path, opset: int = 17
) -> None:
    """Write a graph as an ONNX file for images of one size, without metadata.

    Args:
        graph: The graph.
        image: Images (N, C, H, W) to trace it with; N, H and W are fixed by it.
        path: The file.
        opset: Version of ONNX's operators.

    Raises:
        ConfigError: If onnx is not installed.
        Exception: If the graph cannot be exported, PyTorch's own error.
    """
    require('onnx', 'onnx')
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # of constants, which fixed sizes are
        torch.onnx.export(
            graph,
            (image,),
            str(path),
            input_names=['image'],
            output_names=list(graph.outputs),
            opset_version=opset,
            dynamo=False,
        )
