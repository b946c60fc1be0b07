"""ONNX files in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmgfp.runtimes.base import RUNTIMES, Session, require


@RUNTIMES.register('onnxruntime', 'ort')
class OnnxRuntime(Session):
    """An ONNX file in onnxruntime's CPU provider."""

    suffixes = ('.onnx',)
    package = 'onnxruntime'

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        ort = require(self.package, 'onnx')
        options = session_options(threads)
        self.session = ort.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        self.inputs = {
            i.name: tuple(n if isinstance(n, int) else None for n in i.shape)
            for i in self.session.get_inputs()
        }
        self.outputs = tuple(o.name for o in self.session.get_outputs())
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, in order."""
        values = self.session.run(None, dict(inputs))
        return dict(zip(self.outputs, values, strict=True))


def session_options(threads: int | None = None) -> Any:
    """Return onnxruntime's options of a session.

    Args:
        threads: Threads that one run may use; the runtime's default if None.
    """
    options = require(OnnxRuntime.package, 'onnx').SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options
