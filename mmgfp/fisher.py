"""Fisher information of channel masks, gathered while the model trains.

The importance of a unit is the sum over images of the squared gradient of its mask;
the mask's gradient is that of all its copies together (paper, section 3.2):
``s_i ∝ Σ_n (Σ_x ∂L_n/∂m_x)²`` with ``∂L_n/∂m_x = Σ_hw A_x · ∂L/∂A_x``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def mask_gradient(x: Tensor, grad: Tensor, channel_dim: int) -> Tensor:
    """Gradient of a mask on the channels of ``x``, one row per sample.

    Args:
        x: Input of a layer, (N, C, H, W) with ``channel_dim`` 1 or (N, ..., C) with -1.
        grad: Gradient of the loss by ``x``, of the same shape.
        channel_dim: The dimension that holds the channels.

    Returns:
        Tensor: ``Σ x · grad`` over all but samples and channels, (N, C), float32.
    """
    if channel_dim == 1:
        x, grad = x.flatten(2), grad.flatten(2)
        return torch.einsum('ncp,ncp->nc', x.float(), grad.float())
    x, grad = x.reshape(len(x), -1, x.shape[-1]), grad.reshape(len(x), -1, x.shape[-1])
    return torch.einsum('npc,npc->nc', x.float(), grad.float())


def unit_gradients(
    gradients: Mapping[str, Tensor], units: Mapping[str, Tensor], count: int
) -> Tensor:
    """Sum the gradients of all copies of each unit's mask, image by image.

    Args:
        gradients: (N, C) by layer.
        units: The unit of each input channel by layer, (C,), -1 for none.
        count: Number of units U.

    Returns:
        Tensor: (N, U).
    """
    first = next(iter(gradients.values()))
    total = first.new_zeros(len(first), count + 1)  # the last column takes the rest
    for layer, gradient in gradients.items():
        total.index_add_(1, units[layer].to(gradient.device) % (count + 1), gradient)
    return total[:, :count]


class _Tap(torch.autograd.Function):
    """The identity; its backward hands input and gradient to a `FisherTap`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: FisherTap, layer: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap, ctx.layer = tap, layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.tap.add(ctx.layer, x, grads[0])
        return grads[0], None, None


class FisherTap:
    """Takes mask gradients off the layers of a model, call by call.

    Nothing outlives backward but one (N, C) sum per layer; several calls of a shared
    layer add up.

    Args:
        layers: Modules to tap, by the name of their weight.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.gradients: dict[str, Tensor] = {}
        self._samples: int | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Start to tap."""
        for name, module in self.layers.items():

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> Any:
                return self._tap(name, args)

            self._handles.append(module.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Remove every trace from the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _tap(self, name: str, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return None
        if self._samples is None:
            self._samples = len(x)
        return _Tap.apply(x, self, name), *args[1:]

    def add(self, layer: str, x: Tensor, grad: Tensor) -> None:
        """Add one call's mask gradients to the layer's sum."""
        dim = -1 if isinstance(self.layers[layer], nn.Linear) else 1
        gradient = mask_gradient(x, grad, dim)
        if len(gradient) != self._samples:
            return  # found out and reported before the run; see `prepare`
        if layer in self.gradients:
            self.gradients[layer] += gradient
        else:
            self.gradients[layer] = gradient

    def take(self) -> dict[str, Tensor]:
        """The (N, C) sums by layer since the last call; starts anew."""
        gradients, self.gradients = self.gradients, {}
        self._samples = None
        return gradients
