"""Gradients of channel masks, taken off the layers of a model that trains.

A mask multiplies the input channels of a layer; at one, its gradient for image n is
``∂L_n/∂m = Σ_hw A · ∂L/∂A`` (paper, section 3.2). No mask is needed to know it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mmgfp.tracing import RowUse
from mmgfp.tracing.row_values import Rows

#: Elements whose product is held at once: half a MiB, which stays in a core's cache;
#: elsewhere more of them, since each tile costs the start of a few kernels.
TILE, DEVICE_TILE = 2**17, 2**22


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
    weights: Iterable[str],
    owners: Mapping[str, Sequence[str]],
    use: RowUse,
    purpose: str = 'Fisher statistics',
) -> dict[str, str]:
    """Return weights of layers that no gradients can be taken off, with the reason.

    Args:
        weights: Names of the weights of all layers.
        owners: What `weight_owners` says.
        use: What the layers read.
        purpose: What the gradients are for.
    """
    reasons = {}
    for weight in weights:
        modules = owners.get(weight, ())
        lost = [use.lost[m] for m in modules if m in use.lost]
        if lost:
            reasons[weight] = lost[0]
        elif not use.called.intersection(modules):
            reasons[weight] = f'its input cannot be watched for {purpose}'
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
