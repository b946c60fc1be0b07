"""Mask gradients of pruned units, whose masks are at zero.

A mask m on input channel i of a layer with weight W scales what the layer reads, so
that ``∂L_n/∂m = Σ_x A_x · (W_iᵀ ∂L_n/∂y)_x``, whatever m is. Where a unit is pruned,
its column W_i is zero in the weight: the one kept aside takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgfp.surgery.aside import ColumnsAside
from mmgfp.tracing import RowUse
from mmgfp.utils.layers import LAYER_TYPES, output_dim

#: Modules in which classes of layers compute what their base class does.
PLAIN = ('torch.nn.', 'mmcv.cnn.bricks.wrappers')
DIFFERENTIATED = 'its gradient is used in a loss while some of its columns are pruned'


def is_linear_in_inputs(module: nn.Module, layer: str, use: RowUse) -> bool:
    """Return whether a layer multiplies its input by its weight and does nothing else.

    Args:
        module: The layer.
        layer: Its name.
        use: What the layers of the model read.
    """
    is_plain = type(module).__module__.startswith(PLAIN)
    has_weight = 'weight' in module._parameters  # no reparameterisation
    is_known = isinstance(module, LAYER_TYPES) and is_plain and has_weight
    return is_known and layer not in use.inside


class MaskedInputs:
    """Hands gradients of the inputs that pruned units are read by to the layers' taps.

    Args:
        aside: Columns of pruned units.
        weights: Name of the weight by layer; only of those that are linear in inputs.
    """

    def __init__(self, aside: ColumnsAside, weights: Mapping[str, str]) -> None:
        self.aside = aside
        self.weights = weights

    def watch(
        self, layer: str, module: Any, x: Tensor, output: Tensor, dim: int
    ) -> None:
        """Let the tap on ``x`` know of the gradients when backward comes to the layer.

        Args:
            layer: Name of the layer.
            module: The layer.
            x: Its input, the output of a tap.
            output: Its output.
            dim: The dimension of ``x`` that holds channels.
        """
        tap: Any = x.grad_fn
        call = getattr(tap, 'call', None)
        weight = self.weights.get(layer)
        if call is None or weight is None or not output.requires_grad:
            return
        masked = self.aside.columns(weight, 1 - output_dim(module))
        if masked is None:
            return
        entries, columns = masked
        shape = x.shape  # not the input itself, which need not be kept

        def hook(grad: Tensor) -> None:
            if torch.is_grad_enabled():  # under `create_graph=True`
                call.tap.lost[layer] = DIFFERENTIATED
                return
            extra = input_gradient(module, grad, columns, shape)
            tap.masked = [*getattr(tap, 'masked', ()), (dim, entries, extra)]

        output.register_hook(hook)


@torch.no_grad()
def input_gradient(
    layer: Any, grad: Tensor, columns: Tensor, shape: Sequence[int]
) -> Tensor:
    """Return the gradient by some input channels of a layer, had it other columns.

    Args:
        layer: A linear layer or a convolution without groups; those with groups carry
            units on, and are not masked.
        grad: Gradient of the loss by its output.
        columns: Its weight for these channels, of its layout: (C_out, K, ...), or (K,
            C_out, ...) where it is transposed.
        shape: Shape of its input.

    Returns:
        Tensor: The input's shape, but with K channels.
    """
    columns = columns.to(grad.dtype)
    if isinstance(layer, nn.Linear):
        return grad @ columns
    shape = [shape[0], columns.shape[1 - output_dim(layer)], *shape[2:]]
    is_simple = layer.padding_mode == 'zeros' and not isinstance(layer.padding, str)
    if is_simple:
        return _convolution_input(layer, grad, columns, shape, layer.padding)
    mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
    with torch.enable_grad():
        x = grad.new_zeros(shape, requires_grad=True)
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    none = [0] * (len(shape) - 2)
    by_padded = _convolution_input(layer, grad, columns, padded.shape, none)
    return torch.autograd.grad(padded, x, by_padded)[0]


def _convolution_input(
    layer: Any,
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Return the gradient by an input of this shape of a layer with this weight."""
    x = grad.new_empty(1).expand(*shape)  # as in torch.nn.grad: its shape alone counts
    by_input, _, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        layer.stride,
        padding,
        layer.dilation,
        layer.transposed,
        layer.output_padding,
        layer.groups,
        (True, False, False),
    )
    return by_input
