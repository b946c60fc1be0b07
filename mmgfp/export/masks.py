"""Masks of boxes, as an exported file gives them, put into their image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pasted_masks(
    masks: Tensor, boxes: Tensor, size: Sequence[int], threshold: float
) -> Tensor:
    """Return which pixels of an image belong to each mask, (K, H, W).

    Args:
        masks: Probabilities inside of the boxes, (K, h, w).
        boxes: x1, y1, x2, y2 in pixels of the image, (K, 4).
        size: (H, W) of the image.
        threshold: Probability from which on a pixel belongs to a mask.
    """
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    height, width = size[:2]
    whole = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for i in range(len(masks)):  # one at a time, which needs little memory
        part, where = _do_paste_mask(
            masks[i : i + 1, None], boxes[i : i + 1], height, width
        )
        index = (slice(i, i + 1), *where)
        whole[index] = part >= threshold
    return whole
