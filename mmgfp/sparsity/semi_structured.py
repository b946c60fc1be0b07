"""Weights with 2:4 sparsity in the compressed form that sparse tensor cores read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from mmgfp.sparsity.masks import follows_pattern
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import is_layer

#: Compute capability from which on GPUs have sparse tensor cores (NVIDIA Ampere).
CAPABILITY = (8, 0)


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Let linear layers with 2:4 sparsity compute on a GPU's sparse tensor cores.

    Their weights are replaced by compressed ones, in place, for inference alone: the
    model cannot be trained or saved any more. Convolutions stay dense, as torch has
    sparse kernels for matrix products only.

    Args:
        model: A trained model on a GPU, in half precision.

    Returns:
        dict: Why layers stay dense, by name; all others are converted.

    Raises:
        ConfigError: If the model is not on such a GPU, or no layer can be converted.
    """
    device = next(model.parameters()).device
    if not has_sparse_cores(device):
        raise ConfigError(
            'model',
            'on a GPU with sparse tensor cores (compute capability 8.0 or above)',
            str(device),
            'move it there, or run it dense: zeros are right everywhere',
        )
    dense: dict[str, str] = {}
    converted = 0
    for name, module in model.named_modules():
        if is_layer(module):
            reason = _convert(module)
            converted += reason is None
            if reason is not None:
                dense[name] = reason
    if not converted:
        name, reason = next(iter(dense.items()), ('the model', 'it has no layers'))
        raise ConfigError(
            'model',
            'one with a layer that can be converted',
            f'none; {name}: {reason}',
            'run it dense; TensorRT has sparse convolutions',
        )
    return dense


def has_sparse_cores(device: torch.device) -> bool:
    """Return whether a device has sparse tensor cores."""
    is_gpu = device.type == 'cuda' and torch.version.hip is None
    return is_gpu and torch.cuda.get_device_capability(device) >= CAPABILITY


def _convert(layer: Any) -> str | None:
    """Compress the weight of a layer; return why not if it stays dense."""
    if not isinstance(layer, nn.Linear):
        return 'torch has no sparse kernel for convolutions'
    weight = layer.weight.detach()
    if not follows_pattern(weight, 2, 4):
        return 'not 2:4 sparse'
    try:
        sparse = to_sparse_semi_structured(weight.contiguous())
    except (RuntimeError, NotImplementedError) as error:  # sizes, or precision
        return str(error).splitlines()[0]
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    return None
