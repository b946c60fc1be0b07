"""8-bit files beside those that an export wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmgfp.export.options import ExportOptions
from mmgfp.export.quantize import quantize_onnx, quantize_openvino
from mmgfp.utils.errors import ConfigError

#: Formats with 8-bit files, by what they end in.
WRITERS = {'.onnx': quantize_onnx, '.xml': quantize_openvino}


def check_int8(formats: Sequence[str], options: ExportOptions) -> None:
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


def write_int8(path: Path, images: Sequence[np.ndarray]) -> Path:
    """Write the 8-bit form of an exported file beside it.

    Args:
        path: The ``.onnx`` or ``.xml`` file in floating point.
        images: Inputs (1, C, H, W) on which the ranges of activations are found.

    Returns:
        The file, called as the other with ``_int8`` behind its name.

    Raises:
        ConfigError: If the file has nothing to quantise.
    """
    out = path.with_name(f'{path.stem}_int8{path.suffix}')
    WRITERS[path.suffix](path, out, images)
    return out
