"""OpenVINO's files of exported graphs."""

from __future__ import annotations

from pathlib import Path

from mmgfp.export.options import ExportOptions
from mmgfp.runtimes.base import require
from mmgfp.utils.errors import ConfigError


def write_openvino(
    path: Path, onnx_file: Path, options: ExportOptions, metadata: dict[str, str]
) -> None:
    """Convert an ONNX file; the weights come to lie beside ``path`` as ``.bin``.

    Args:
        path: The ``.xml`` file.
        onnx_file: An ONNX file in single precision.
        options: Whether weights are stored in half precision.
        metadata: Texts to store, by key.

    Raises:
        ConfigError: If OpenVINO is not installed or cannot convert the graph.
    """
    openvino = require('openvino', 'openvino')
    try:
        model = openvino.convert_model(str(onnx_file))
    except Exception as error:  # the converter raises many kinds
        reason = f'{type(error).__name__}: {str(error).strip()[:300]}'
        raise ConfigError(
            'the graph', 'one that OpenVINO converts', reason, 'use another format'
        ) from error
    for key, text in metadata.items():
        model.set_rt_info(text, [key])
    openvino.save_model(model, str(path), compress_to_fp16=options.fp16)
