"""TorchScript files of exported graphs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.export.options import INPUT, ExportOptions
from mmgfp.runtimes.torch_script import NAMES
from mmgfp.utils.errors import ConfigError


def write_torchscript(
    path: Path,
    graph: nn.Module,
    image: Tensor,
    options: ExportOptions,
    metadata: dict[str, str],
) -> None:
    """Trace a graph, freeze it with its batch norms folded, and save it.

    Args:
        path: The file.
        graph: An `ExportGraph` in eval mode.
        image: An input of the size to export.
        options: Which axes are free.
        metadata: Texts to store, by key.

    Raises:
        ConfigError: If the graph cannot be traced.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # of tracing: sizes fixed on purpose
        try:
            traced = torch.jit.trace(graph, (image,), check_trace=False)
            module = torch.jit.freeze(traced.eval())
        except Exception as error:  # tracing raises many kinds
            reason = f'{type(error).__name__}: {str(error).strip()[:300]}'
            raise ConfigError(
                'the graph', 'one that torch.jit traces', reason, 'use another format'
            ) from error
    axes = options.free_axes()
    shape: list[Any] = [None if i in axes else n for i, n in enumerate(image.shape)]
    names = {'inputs': {INPUT: shape}, 'outputs': list(graph.outputs)}  # type: ignore[arg-type]
    extra = {NAMES: json.dumps(names), 'metadata.json': json.dumps(metadata)}
    torch.jit.save(module, str(path), _extra_files=extra)
