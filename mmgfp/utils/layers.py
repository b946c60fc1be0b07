"""Modules that count as layers, and the layout of their weights."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

#: Modules that count as layers (paper, section 3.1: "only Conv/FC layers matter").
LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear)
CONV_ATTRIBUTES = ('in_channels', 'out_channels', 'groups')


def is_layer(module: nn.Module) -> bool:
    """Return whether a module counts as a layer: Conv and FC (paper, section 3.1).

    Deformable convolutions of mmcv and torchvision have no base class in common with
    the others; they are known by a weight whose shape agrees with their attributes.

    Examples:
        >>> from torch import nn
        >>> [is_layer(m) for m in (nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.ReLU())]
        [True, True, False]
    """
    if isinstance(module, LAYER_TYPES):
        return True
    if not has_conv_attributes(module) or not hasattr(module, 'kernel_size'):
        return False
    conv: Any = module
    width = conv.out_channels, conv.in_channels // conv.groups
    return conv.weight.shape[:2] == width


def has_conv_attributes(module: nn.Module) -> bool:
    """Return whether a module has a weight and counts channels as convolutions do.

    Unlike `is_layer`, this holds also while the attributes are out of date, as after
    the weight was replaced by a smaller one.
    """
    return all(hasattr(module, name) for name in CONV_ATTRIBUTES) and isinstance(
        getattr(module, 'weight', None), Tensor
    )


def output_dim(module: nn.Module) -> int:
    """Return the dimension of a layer's weight that counts its outputs.

    Transposed convolutions hold their weight as (C_in, C_out, ...), all other layers
    as (C_out, C_in, ...).
    """
    return int(getattr(module, 'transposed', False))


def matches(layer: str, pattern: str) -> bool:
    """Return whether a pattern names the layer, a module around it, or is its glob."""
    return fnmatchcase(layer, pattern) or layer.startswith(f'{pattern}.')
