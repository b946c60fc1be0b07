"""Proposals and RoI counts of two-stage detectors that do not depend on weights.

A RPN picks its proposals by sorting and by NMS, so that the last bit of a feature can
decide which RoIs the second stage sees, and an untrained RPN hands on any number of
them. Comparing two models and counting costs therefore use made-up proposals.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmgfp.utils.tree import tree_tensors

#: RoIs per image of box heads, where the model samples none: the number of the paper
#: and of MMDetection's configs.
BOX_ROIS = 512
#: RoIs per image for parts that run on detections only, where ``test_cfg`` is silent.
DETECTIONS = 100
#: Words in the names of such parts.
ON_DETECTIONS = ('mask', 'grid', 'point')


@contextmanager
def fixed_proposals(model: Any, count: int = 8) -> Iterator[list[Any]]:
    """Let the RPN of a two-stage detector propose the same boxes for all images.

    Args:
        model: Any model; one without RPN and RoI head is left alone.
        count: Proposals per image.

    Yields:
        list: The raw outputs of the RPN, filled as the model runs.
    """
    outputs: list[Any] = []
    rpn, roi_head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    heads: list[Any] = []
    if isinstance(rpn, nn.Module) and isinstance(roi_head, nn.Module):
        heads = [m for m in rpn.modules() if hasattr(m, 'predict_by_feat')]
    for head in heads:
        head.predict_by_feat = partial(_propose, outputs, count)
    try:
        yield outputs
    finally:
        for head in heads:
            del head.predict_by_feat


def _propose(
    outputs: list[Any], count: int, *raw: Any, batch_img_metas: Any, **_: Any
) -> list[InstanceData]:
    """Stand in for the ``predict_by_feat`` of a RPN."""
    outputs.append(raw)
    like = next(tree_tensors(raw))
    proposals = []
    for image, meta in enumerate(batch_img_metas):
        boxes = _boxes(count, meta['img_shape'], image).to(like)
        proposals.append(
            InstanceData(
                bboxes=boxes,
                scores=torch.linspace(1.0, 0.5, count).to(like),
                labels=torch.zeros(count, dtype=torch.long, device=like.device),
            )
        )
    return proposals


def _boxes(count: int, size: tuple[int, ...], seed: int) -> Tensor:
    """Return boxes of an eighth to the whole of (H, W), (count, 4) as corners."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size[:2]
    scale = torch.tensor([width, height], device='cpu')
    shares = torch.logspace(-3, 0, count, 2, device='cpu')[:, None]  # (count, 1)
    corners = torch.rand(count, 2, generator=generator, device='cpu') * (1 - shares)
    return torch.cat([corners * scale, (corners + shares) * scale], 1)


def rois_per_image(model: Any) -> dict[str, int]:
    """Return the number of RoIs for which each part of a RoI head is counted.

    Box heads count the RoIs that training samples (512 as a rule, as in the paper);
    mask, grid and point heads, which inference runs on detections, the largest number
    of detections (100 as a rule). A part that both kinds share is counted like a box
    head. A head without a sampler, whose proposals are learned, is counted as it runs.

    Returns:
        dict: Numbers of RoIs per image by the part's name.
    """
    roi_head = getattr(model, 'roi_head', None)
    if not isinstance(roi_head, nn.Module):
        return {}
    sampler: Any = getattr(roi_head, 'bbox_sampler', None)
    if isinstance(sampler, list):
        sampler = next(iter(sampler), None)
    boxes = BOX_ROIS if sampler is None else getattr(sampler, 'num', None)
    if boxes is None:
        return {}
    test_cfg: Any = getattr(roi_head, 'test_cfg', None) or {}
    detections = test_cfg.get('max_per_img', DETECTIONS)
    return {
        f'roi_head.{name}': detections if _on_detections(name) else boxes
        for name, _ in roi_head.named_children()
    }


def _on_detections(part: str) -> bool:
    return any(word in part for word in ON_DETECTIONS)
