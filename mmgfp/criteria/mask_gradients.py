"""Gradients of channel masks, taken off the layers of a model that trains.

A mask multiplies the input channels of a layer; at one, its gradient for image n is
``∂L_n/∂m = Σ_hw A · ∂L/∂A`` (paper, section 3.2). No mask is needed to know it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

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
#: Under this name a tensor knows how it was tapped last.
TAPPED = 'mmgfp_tapped'
#: Elements whose product is held at once: half a MiB, which stays in a core's cache;
#: elsewhere more of them, since each tile costs the start of a few kernels.
TILE, DEVICE_TILE = 2**17, 2**22
#: Why a layer's gradients are incomplete; the detail follows the first.
UNTOLD = 'its rows cannot be told to images'
FROZEN = 'its input needs no gradient, as behind frozen layers'


def mask_gradient(
    x: Tensor, grad: Tensor, channel_dim: int, rows: Rows | None = None
) -> Tensor:
    """Return the gradient of a mask on the channels of ``x``, by sample or image.

    The product of the two is never held whole: one tile after the other is multiplied
    and summed while it is in a cache, whatever the memory format.

    Args:
        x: Input of a layer, (N, C, H, W) with ``channel_dim`` 1 or (N, ..., C) with -1.
        grad: Gradient of the loss by ``x``, of the same shape.
        channel_dim: The dimension that holds the channels.
        rows: Images that the samples belong to; those of one image are summed.

    Returns:
        Tensor: ``Σ x · grad`` over all but samples and channels, (N, C), of at least
        single precision.
    """
    channel_dim %= x.dim()
    index, count = None, len(x)
    if rows is not None and rows.index is not None:
        index, count = rows.index % (rows.images + 1), rows.images + 1
    # With an index, the last row takes samples of no image.
    # Half precision would overflow, or sum to too little.
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(count, x.shape[channel_dim], dtype=dtype)
    summed = [d for d in range(1, x.dim()) if d != channel_dim]
    for tile in _tiles(x):
        part = x[tile].to(dtype) * grad[tile].to(dtype)
        part = part.sum(summed) if summed else part  # (n, c)
        columns = tile[channel_dim] if channel_dim < len(tile) else slice(None)
        if index is None:
            total[tile[0], columns] += part
        else:
            total[:, columns].index_add_(0, index[tile[0]], part)
    return total if index is None else total[:-1]


def _tiles(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Yield indices that cut ``x`` into tiles, along samples and an outer dimension."""
    size = TILE if x.device.type == 'cpu' else DEVICE_TILE
    outer = max(range(1, x.dim()), key=x.stride)
    between = (slice(None),) * (outer - 1)
    sample = max(1, x[0].numel())
    samples = max(1, size // sample)
    length = max(1, size * x.shape[outer] // sample)
    for n in range(0, len(x), samples):
        for k in range(0, x.shape[outer], length):
            yield slice(n, n + samples), *between, slice(k, k + length)


def untappable(
    weights: Iterable[str], owners: Mapping[str, Sequence[str]], use: RowUse
) -> dict[str, str]:
    """Return weights of layers that no gradients can be taken off, with the reason.

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
    every = torch.cat(list(gradients.values()), 1)
    index = torch.cat([units[layer] for layer in gradients]).to(every.device)
    total = every.new_zeros(len(every), count + 1)  # the last column takes the rest
    total.index_add_(1, index % (count + 1), every)
    return total[:, :count]


def _shareable(x: Tensor) -> bool:
    """Return whether other layers may read ``x`` through the same tap.

    A leaf may outlive the graph. Whoever watches what is saved for backward, as
    checkpointing does, must see the same again when it runs a part twice; where torch
    does not say whether somebody watches, nothing is shared.
    """
    hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return x.grad_fn is not None and hooks is not None and hooks(True) is None


class _Tap(torch.autograd.Function):
    """The identity; its backward hands input and gradient to a `MaskGradientTap`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tap: MaskGradientTap, layer: str, rows: Rows
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap, ctx.layer, ctx.rows = tap, layer, rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.tap.add(ctx.layer, x, grads[0], ctx.rows)
        return grads[0], None, None, None


class MaskGradientTap:
    """Takes mask gradients off the layers of a model, call by call.

    Nothing outlives backward but one (N, C) sum per layer; several calls of a shared
    layer add up. Layers that read the same tensor are tapped together, as the sum of
    their mask gradients is all that matters: it stands under the name of the first.

    Args:
        layers: Modules to tap, by the name of their weight.
        use: What the layers read; where it does not say, the rows are followed
            through the graph.
        first: Modules that read the images themselves.
        units: The unit of each input channel by layer, (C,). Layers of other units
            are not tapped together, and none without it.

    Attributes:
        active: Whether calls are tapped; otherwise they cost nothing.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        use: RowUse = RowUse(),  # noqa: B008
        first: Iterable[nn.Module] = (),
        units: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.use = use
        self.first = tuple(first)
        self.active = True
        #: Equal for layers that read one tensor in the same way.
        self._ways: dict[str, Any] = {
            name: (
                self._channel_dim(name),
                name in use.images,
                name in use.rois,
                name if units is None else units[name].numpy().tobytes(),
            )
            for name in self.layers
        }
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
        if not (self.active and torch.is_grad_enabled() and len(args[0])):
            return None
        x = args[0]
        if not x.requires_grad:
            self.lost[name] = FROZEN
            return None
        # A layer inside another one, such as the offsets of a deformable convolution,
        # reads the same input but has a mask copy of its own.
        x = getattr(x, UNTAPPED, x)
        reading = (id(self), x._version, self._ways[name])
        shareable = x is args[0] and _shareable(x)
        if shareable and hasattr(x, TAPPED):
            *other, tapped = getattr(x, TAPPED)
            if (*other,) == reading and tapped() is not None:
                return tapped(), *args[1:]
        rows = self._rows(name, x)
        if isinstance(rows, Lost):
            self.lost[name] = f'{UNTOLD}: {rows.reason}'
            return None
        tapped = _Tap.apply(x, self, name, rows)
        mark_rows(tapped, rows)
        setattr(tapped, UNTAPPED, x)
        if shareable:
            setattr(x, TAPPED, (*reading, TensorWeakRef(tapped)))
        return tapped, *args[1:]

    def _channel_dim(self, name: str) -> int:
        return -1 if isinstance(self.layers[name], nn.Linear) else 1

    def _rows(self, name: str, x: Tensor) -> Rows | Lost:
        if name in self.use.images:
            return Rows(len(x))
        rows = rows_of(x)
        if name in self.use.rois and isinstance(rows, Rows) and not rows.pooled:
            return Lost('the features of its RoIs need no gradient')
        return rows

    def add(self, layer: str, x: Tensor, grad: Tensor, rows: Rows) -> None:
        """Add one call's mask gradients to the layer's sum."""
        gradient = mask_gradient(x, grad, self._channel_dim(layer), rows)  # (N, C)
        others = next(iter(self.gradients.values()), gradient)
        if len(gradient) != len(others):
            found = f'{len(gradient)} images where others saw {len(others)}'
            self.lost[layer] = f'{UNTOLD}: {found}'
        elif layer in self.gradients:
            self.gradients[layer] += gradient
        else:
            self.gradients[layer] = gradient

    def take(self) -> dict[str, Tensor]:
        """Return the (N, C) sums by layer since the last call, and start anew."""
        gradients, self.gradients = self.gradients, {}
        return gradients

    def take_lost(self) -> dict[str, str]:
        """Return layers with incomplete sums since the last call, and start anew."""
        lost, self.lost = self.lost, {}
        return lost
