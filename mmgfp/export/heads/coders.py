"""Boxes from what heads regress, for any number of leading dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Default of MMDetection's coders for the ratio between a prior's side and its box's.
WH_RATIO_CLIP = 16 / 1000


def decode_deltas(coder: Any, priors: Tensor, deltas: Tensor) -> Tensor:
    """Return boxes by shifts and log scales of priors, as `DeltaXYWHBBoxCoder`.

    Args:
        coder: The coder with the head's means and deviations.
        priors: Boxes (..., 4) as corners, in pixels.
        deltas: Regressed values (..., 4).

    Returns:
        Tensor: Boxes (..., 4) as corners, in pixels, not clipped.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    center = (priors[..., :2] + priors[..., 2:]) * 0.5
    size = priors[..., 2:] - priors[..., :2]
    shift, scale = size * deltas[..., :2], deltas[..., 2:]
    limit = abs(math.log(WH_RATIO_CLIP))
    if coder.add_ctr_clamp:
        shift = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp)
        scale = scale.clamp(max=limit)
    else:
        scale = scale.clamp(-limit, limit)
    center, half = center + shift, size * scale.exp() * 0.5
    return torch.cat([center - half, center + half], -1)


def decode_distances(coder: Any, points: Tensor, distances: Tensor) -> Tensor:
    """Return boxes by distances of their sides, as `DistancePointBBoxCoder`.

    Args:
        coder: Not needed.
        points: Points (..., 2) in pixels.
        distances: Left, top, right, bottom (..., 4) in pixels.

    Returns:
        Tensor: Boxes (..., 4) as corners, in pixels, not clipped.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def decode_sides(coder: Any, priors: Tensor, values: Tensor) -> Tensor:
    """Return boxes by distances in units of the priors' sizes, as `TBLRBBoxCoder`.

    Args:
        coder: The coder with the head's factors.
        priors: Boxes (..., 4) as corners, in pixels.
        values: Top, bottom, left, right (..., 4).

    Returns:
        Tensor: Boxes (..., 4) as corners, in pixels, not clipped.
    """
    top, bottom, left, right = (values * values.new_tensor(coder.normalizer)).unbind(-1)
    center = (priors[..., :2] + priors[..., 2:]) * 0.5
    size = priors[..., 2:] - priors[..., :2]
    before = center - size * torch.stack([left, top], -1)
    after = center + size * torch.stack([right, bottom], -1)
    return torch.cat([before, after], -1)


def decode_cells(priors: Tensor, values: Tensor) -> Tensor:
    """Return boxes by centers and log sizes in units of strides, as YOLOX.

    Args:
        priors: Points and strides (..., 4) in pixels.
        values: Regressed values (..., 4).

    Returns:
        Tensor: Boxes (..., 4) as corners, in pixels, not clipped.
    """
    center = values[..., :2] * priors[..., 2:] + priors[..., :2]
    half = values[..., 2:].exp() * priors[..., 2:] * 0.5
    return torch.cat([center - half, center + half], -1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (..., 4) cut off at the borders of an image of (H, W)."""
    height, width = size
    corner = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), corner)
