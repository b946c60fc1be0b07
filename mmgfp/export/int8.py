"""8-bit files beside those that an export wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.export.calibration import CalibrationImages
from mmgfp.export.metadata import KEY
from mmgfp.export.options import ExportOptions
from mmgfp.export.quantize import quantize_onnx, quantize_openvino
from mmgfp.runtimes import open_model
from mmgfp.utils.errors import ConfigError

#: Formats with 8-bit files, by what they end in.
WRITERS = {'.onnx': quantize_onnx, '.xml': quantize_openvino}


def check_int8(formats: list[str], options: ExportOptions) -> None:
    """Check that what is asked for can be quantised.

    Raises:
        ConfigError: If it cannot.
    """
    for flag, given in {
        '--format torchscript': 'torchscript' in formats,
        '--preprocess': options.preprocess,
        '--fp16': options.fp16,
    }.items():
        if given:
            remedy = 'export those files in a run of their own'
            raise ConfigError(flag, 'left out with --int8', 'both', remedy)


def write_int8(cfg: Config, model: Any, path: Path, count: int) -> Path:
    """Write the 8-bit form of an exported file beside it.

    Args:
        cfg: The model's config, whose data the ranges of activations are found on.
        model: The model that was exported.
        path: The ``.onnx`` or ``.xml`` file in floating point.
        count: Number of images.

    Returns:
        The file, called as the other with ``_int8`` behind its name.

    Raises:
        ConfigError: If the config has no data, or the file nothing to quantise.
    """
    session = open_model(path)
    size = next(iter(session.inputs.values()))
    batch = size[0] or 1
    if batch != 1:
        got = f'{batch} in {path}'
        raise ConfigError('the batch size', '1 or free with --int8', got, 'export so')
    pad_value = json.loads(session.metadata.get(KEY, '{}')).get('pad_value', 0.0)
    images = CalibrationImages(cfg, model, count, size[2:], pad_value)
    out = path.with_name(f'{path.stem}_int8{path.suffix}')
    WRITERS[path.suffix](path, out, images)
    return out
