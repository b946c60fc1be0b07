"""Fisher information of channel masks, gathered while the model trains.

The importance of a unit is the sum over images of the squared gradient of its mask;
the mask's gradient is that of all its copies together (paper, section 3.2):
``s_i ∝ Σ_n (Σ_x ∂L_n/∂m_x)²`` with ``∂L_n/∂m_x = Σ_hw A_x · ∂L/∂A_x``.
Where a layer's rows are RoIs, those of one image are summed before the square.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.tracing.rows import (
    Lost,
    Rows,
    RowUse,
    mark_output,
    mark_rows,
    rows_of,
)

#: Under this name a layer's tapped input knows what it was before.
UNTAPPED = 'mmgfp_untapped'
#: Why a layer's gradients are incomplete; the detail follows the first.
UNTOLD = 'its rows cannot be told to images'
FROZEN = 'its input needs no gradient, as behind frozen layers'


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
        x, grad, what = x.flatten(2), grad.flatten(2), 'ncp,ncp->nc'
    else:
        shape, what = (len(x), -1, x.shape[-1]), 'npc,npc->nc'
        x, grad = x.reshape(shape), grad.reshape(shape)
    # Somebody may call backward inside autocast, which would sum in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum(what, x.float(), grad.float())


def weight_owners(model: nn.Module) -> dict[str, list[str]]:
    """Names of the modules that use each weight, by the weight's first name."""
    names = {id(p): n for n, p in model.named_parameters()}
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        weight = names.get(id(getattr(module, 'weight', None)))
        if weight is not None:
            owners.setdefault(weight, []).append(name)
    return owners


def untapped(
    weights: Iterable[str], owners: Mapping[str, Sequence[str]], use: RowUse
) -> dict[str, str]:
    """Weights of layers that no statistics can be taken off, with the reason.

    Args:
        weights: Names of the weights of all layers.
        owners: What `weight_owners` says.
        use: What the layers read.
    """
    reasons = {}
    for weight in weights:
        modules = owners.get(weight, ())
        lost = [use.lost[m] for m in modules if m in use.lost]
        if lost:
            reasons[weight] = f'{UNTOLD}: {lost[0]}'
        elif not use.called.intersection(modules):
            reasons[weight] = 'its input cannot be watched for Fisher statistics'
    return reasons


def sum_by_image(gradients: Tensor, rows: Rows) -> Tensor:
    """Sum the gradients (R, C) of the rows of each image, (N, C)."""
    if rows.index is None:
        return gradients
    total = gradients.new_zeros(rows.images + 1, gradients.shape[1])
    # The last row takes those of no image.
    total.index_add_(0, rows.index % (rows.images + 1), gradients)
    return total[:-1]


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
    def forward(ctx: Any, x: Tensor, tap: FisherTap, layer: str, rows: Rows) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap, ctx.layer, ctx.rows = tap, layer, rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.tap.add(ctx.layer, x, grads[0], ctx.rows)
        return grads[0], None, None, None


class FisherTap:
    """Takes mask gradients off the layers of a model, call by call.

    Nothing outlives backward but one (N, C) sum per layer; several calls of a shared
    layer add up.

    Args:
        layers: Modules to tap, by the name of their weight.
        use: What the layers read; where it does not say, the rows are followed
            through the graph.
        first: Modules that read the images themselves.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        use: RowUse = RowUse(),  # noqa: B008
        first: Iterable[nn.Module] = (),
    ) -> None:
        self.layers = dict(layers)
        self.use = use
        self.first = tuple(first)
        self.gradients: dict[str, Tensor] = {}
        self.lost: dict[str, str] = {}
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Start to tap."""
        for name, module in self.layers.items():

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> Any:
                return self._tap(name, args)

            self._handles.append(module.register_forward_pre_hook(hook))
        self._handles += [m.register_forward_hook(mark_output) for m in self.first]

    def detach(self) -> None:
        """Remove every trace from the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _tap(self, name: str, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if not (torch.is_grad_enabled() and len(x)):
            return None
        if not x.requires_grad:
            self.lost[name] = FROZEN
            return None
        # A layer inside another one, such as the offsets of a deformable convolution,
        # reads the same input but has a mask copy of its own.
        x = getattr(x, UNTAPPED, x)
        rows = self._rows(name, x)
        if isinstance(rows, Lost):
            self.lost[name] = f'{UNTOLD}: {rows.reason}'
            return None
        tapped = _Tap.apply(x, self, name, rows)
        mark_rows(tapped, rows)
        setattr(tapped, UNTAPPED, x)
        return tapped, *args[1:]

    def _rows(self, name: str, x: Tensor) -> Rows | Lost:
        if name in self.use.images:
            return Rows(len(x))
        rows = rows_of(x)
        if name in self.use.rois and isinstance(rows, Rows) and not rows.pooled:
            return Lost('the features of its RoIs need no gradient')
        return rows

    def add(self, layer: str, x: Tensor, grad: Tensor, rows: Rows) -> None:
        """Add one call's mask gradients to the layer's sum."""
        dim = -1 if isinstance(self.layers[layer], nn.Linear) else 1
        gradient = sum_by_image(mask_gradient(x, grad, dim), rows)  # (N, C)
        others = next(iter(self.gradients.values()), gradient)
        if len(gradient) != len(others):
            found = f'{len(gradient)} images where others saw {len(others)}'
            self.lost[layer] = f'{UNTOLD}: {found}'
        elif layer in self.gradients:
            self.gradients[layer] += gradient
        else:
            self.gradients[layer] = gradient

    def take(self) -> dict[str, Tensor]:
        """The (N, C) sums by layer since the last call; starts anew."""
        gradients, self.gradients = self.gradients, {}
        return gradients

    def take_lost(self) -> dict[str, str]:
        """Layers with incomplete sums since the last call, and why; starts anew."""
        lost, self.lost = self.lost, {}
        return lost
