"""Which weights of a model can be set to zero, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import LAYER_TYPES, is_layer, matches
from mmgfp.utils.modules import weight_owners

#: Layers of mmcv, MMDetection and timm that standardise their weight in each pass.
STANDARDISING = ('ConvWS2d', 'ConvAWS2d', 'StdConv2d', 'ScaledStdConv2d')
OTHER = 'no weight of a convolution or linear layer'
COMPUTED = 'its weight is computed from other parameters'


@dataclass(frozen=True)
class Selection:
    """Weights that take part, and those that do not.

    Attributes:
        weights: Weights by their names; one that several layers share is there once.
        left_out: Why a layer, or a parameter of another module, stays as it is.
    """

    weights: Mapping[str, Tensor]
    left_out: Mapping[str, str]


def select_weights(
    model: nn.Module, keep: Sequence[str] = (), multiple: int | None = None
) -> Selection:
    """Find the weights of a model that can be set to zero.

    They are the weights of convolutions and linear layers. Vectors, such as biases and
    scales of norms, are not even listed.

    Args:
        model: The model.
        keep: Names or glob patterns of layers that stay as they are.
        multiple: Weights of a group along the inputs; None without such groups.

    Raises:
        ConfigError: If a pattern fits no layer, a parameter has no shape yet, or no
            weight is left.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> selection = select_weights(net, multiple=4)
        >>> list(selection.weights), dict(selection.left_out)
        (['2.weight'], {'0': '3 input channels, no multiple of 4'})
    """
    _check_shapes(model)
    modules: dict[str, Any] = dict(model.named_modules())
    layers = [n for n, m in modules.items() if is_layer(m) or _computes_weight(m)]
    kept = _kept(layers, keep)
    owners = weight_owners(model)
    weights: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        users = owners.get(name, [])
        if any(name.startswith(f'{n}.') for n in layers) and not users:
            continue  # a bias, or what a weight is computed from
        if not users or not all(n in layers for n in users):
            if parameter.dim() > 1:
                left_out[name] = OTHER
            continue
        reasons = ['kept as configured' for n in users if n in kept]
        reasons += [r for n in users if (r := _obstacle(modules[n], multiple))]
        if reasons:
            left_out[users[0]] = reasons[0]
        else:
            weights[name] = parameter
    left_out |= {n: COMPUTED for n in layers if _computes_weight(modules[n])}
    _check_any(weights, left_out)
    return Selection(weights, left_out)


def _check_shapes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConfigError(
                'model',
                'one whose parameters all have a shape',
                f'{name} of a lazy layer, which has none before the first batch',
                'give the layer its number of inputs',
            )


def _check_any(weights: Mapping[str, Tensor], left_out: Mapping[str, str]) -> None:
    if not weights:
        name, reason = next(iter(left_out.items()), ('it', 'no such layers'))
        raise ConfigError(
            'model',
            'one with weights that can be set to zero',
            f'none; of {name}: {reason}',
            'loosen keep, or choose another kind',
        )


def _computes_weight(module: nn.Module) -> bool:
    """Return whether a layer's weight is no parameter, as under weight norm."""
    is_plain = isinstance(module, LAYER_TYPES)
    return is_plain and 'weight' not in module._parameters


def _kept(layers: Sequence[str], keep: Sequence[str]) -> set[str]:
    kept: set[str] = set()
    for pattern in keep:
        fitting = {layer for layer in layers if matches(layer, pattern)}
        if not fitting:
            raise ConfigError(
                'keep',
                'names or patterns of convolutions and linear layers of the model',
                repr(pattern),
                'see the layer names that tools/analyze.py lists',
            )
        kept |= fitting
    return kept


def _obstacle(layer: Any, multiple: int | None) -> str | None:
    """Return why a layer cannot take part, None if it can."""
    kind = type(layer).__name__
    if not layer.weight.requires_grad:
        return 'frozen: nothing would make up for its zeros'
    if kind in STANDARDISING:
        return 'its weight is standardised in each pass, after which no zero is left'
    if multiple is None:
        return None
    if not isinstance(layer, LAYER_TYPES) or getattr(layer, 'transposed', False):
        return f'{kind} has no sparse kernel'
    width = layer.weight.shape[1]
    groups = getattr(layer, 'groups', 1)
    if width % multiple == 0:
        return None
    if groups > 1 and width == 1:
        return 'depth-wise: each output reads one channel'
    of_group = ' of each conv group' if groups > 1 else ''
    return f'{width} input channels{of_group}, no multiple of {multiple}'
