"""TorchScript files in PyTorch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from mmgfp.runtimes.base import RUNTIMES, Session
from mmgfp.utils.errors import ConfigError

#: The entry of a TorchScript file that holds names of inputs and outputs.
NAMES = 'names.json'


@RUNTIMES.register('torchscript')
class TorchScript(Session):
    """A TorchScript file, run by PyTorch on the CPU.

    PyTorch has one number of threads for the whole process: opening a file sets it.
    Files with NMS need the ops of torchvision.
    """

    suffixes = ('.pt', '.ts')
    package = 'torch'

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        with suppress(ImportError):
            importlib.import_module('torchvision')  # registers NMS and RoIAlign
        extra = {NAMES: '', 'metadata.json': ''}
        try:
            self.module = torch.jit.load(str(path), 'cpu', _extra_files=extra)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ConfigError(
                f'model {path}',
                'a whole TorchScript file with ops that are installed',
                (lines or ['no reason'])[0],
                'install torchvision for torchvision::nms, or check the file',
            ) from error
        names = json.loads(extra[NAMES] or '{}')
        self.inputs = {
            name: tuple(shape) for name, shape in names.get('inputs', {}).items()
        }
        self.outputs = tuple(names.get('outputs', ()))
        self.metadata = json.loads(extra['metadata.json'] or '{}')

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, in order."""
        tensors = [torch.from_numpy(inputs[name]) for name in self.inputs or inputs]
        with torch.inference_mode():
            values = self.module(*tensors)
        values = values if isinstance(values, tuple | list) else [values]
        names = self.outputs or tuple(f'output{i}' for i in range(len(values)))
        return {n: v.numpy() for n, v in zip(names, values, strict=True)}
