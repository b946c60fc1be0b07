"""ONNX files and OpenVINO's own in OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mmgfp.runtimes.base import RUNTIMES, Session, require


@RUNTIMES.register('openvino', 'ov')
class OpenVINO(Session):
    """A model in OpenVINO's CPU plugin, at full precision and lowest latency."""

    suffixes = ('.onnx', '.xml')
    package = 'openvino'

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        core = shared_core()
        options = cpu_options(threads)
        model = core.read_model(str(path))
        self.model = core.compile_model(model, 'CPU', options)
        self.request = self.model.create_infer_request()
        self.inputs = {
            port.any_name: tuple(
                n.get_length() if n.is_static else None for n in port.partial_shape
            )
            for port in self.model.inputs
        }
        self.outputs = tuple(port.any_name for port in self.model.outputs)
        # Of an ONNX file they come under the name 'framework', nested.
        info = model.rt_info
        nested = info['framework'] if 'framework' in info else {}  # noqa: SIM401
        values = {**(nested if isinstance(nested, dict) else {})}
        values |= {k: v for k, v in info.items() if not isinstance(v, dict)}
        self.metadata = {key: str(values[key].value) for key in values}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, in order."""
        values = self.request.infer(dict(inputs), share_inputs=True)
        arrays = [np.array(values[port]) for port in self.model.outputs]
        return dict(zip(self.outputs, arrays, strict=True))


@cache
def shared_core() -> Any:
    """Return the process's one core of OpenVINO.

    Its CPU plugin sets the stack on which signals are handled. Where two of them end in
    the order in which they began, the memory of one that has ended stays set, and the
    next Ctrl-C or SIGTERM is a segmentation fault.

    Raises:
        ConfigError: If OpenVINO is not installed.
    """
    return require('openvino', 'openvino').Core()


def cpu_options(threads: int | None = None) -> dict[str, str]:
    """Return OpenVINO's options of its CPU plugin: full precision, lowest latency.

    Args:
        threads: Threads that one run may use; the runtime's default if None.
    """
    # Not bfloat16, which it takes by default where the processor has it.
    options = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    if threads is not None:
        options['INFERENCE_NUM_THREADS'] = str(threads)
    return options
