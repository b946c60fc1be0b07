"""Candidates of a batch of images: picked by score, suppressed, cut to one length.

A candidate that is none, by its score or its size, keeps its place with score 0: all
images have the same number of candidates, and no shape depends on what is seen.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torchvision.ops  # noqa: F401  # registers torch.ops.torchvision
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mmgfp.export.heads.support import iou_threshold


class Candidates(NamedTuple):
    """Boxes (N, M, 4) as corners in pixels, scores (N, M), labels (N, M)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def static(size: Any) -> int:
    """Return a size of the image that is traced as a number that stays.

    The graph is for this size of images; only their number may be free.
    """
    with warnings.catch_warnings():  # that it stays is meant
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return int(size)


def rows(outputs: Tensor, width: int) -> Tensor:
    """Return outputs (N, A * width, H, W) by priors, as (N, H * W * A, width)."""
    return outputs.permute(0, 2, 3, 1).reshape(outputs.shape[0], -1, width)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return rows (N, K, C) of ``values`` (N, M, C) by ``index`` (N, K)."""
    # One Gather of whole rows: GatherElements would need an index for each number, and
    # OpenVINO refuses some of those that ONNX allows.
    images, count, width = values.shape
    first = torch.arange(images, device=index.device)[:, None] * count
    taken = values.reshape(-1, static(width))[(index + first).flatten()]
    return taken.reshape(-1, static(index.shape[1]), static(width))


def best_pairs(scores: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest scores among all pairs of prior and class.

    Args:
        scores: Scores, or anything that grows with them, (N, A, C).
        limit: Number of pairs K, or all if there are fewer.

    Returns:
        tuple: Scores, priors and classes, (N, K) each, highest scores first.
    """
    _, count, classes = map(static, scores.shape)
    # A pair among the best is of a prior among the best by its highest class: sorting
    # first the priors, then the pairs of those, is exact and much less work.
    priors = scores.amax(-1).topk(min(limit, count), 1).indices
    scores = take(scores, priors).flatten(1)
    limit = min(limit, min(limit, count) * classes)
    scores, pairs = scores.topk(limit, 1)
    return scores, priors.gather(1, pairs // classes), pairs % classes


def without_small(candidates: Candidates, cfg: Any) -> Candidates:
    """Drop boxes of no more than ``cfg.min_bbox_size`` pixels, if it is set."""
    smallest = cfg.get('min_bbox_size', -1)
    if smallest < 0:
        return candidates
    boxes, scores, labels = candidates
    size = boxes[..., 2:] - boxes[..., :2]
    large = (size > smallest).all(-1)
    return Candidates(boxes, torch.where(large, scores, 0.0), labels)


def suppress(candidates: Candidates, nms: Any, limit: int) -> Candidates:
    """Apply NMS to each class by itself, and keep the best.

    Args:
        candidates: M of them per image.
        nms: The config of NMS, as `batched_nms` takes it.
        limit: Number K of results per image.

    Returns:
        Candidates: K per image, highest scores first; at the end, candidates with
        label -1, score 0 and a box of zeros.
    """
    boxes, scores, labels = candidates
    apart = boxes.float()
    if not nms.get('class_agnostic', False):
        # As batched_nms does, so that the same boxes overlap, rounding included.
        present = torch.where((scores > 0)[..., None], apart, 0.0)
        span = present.amax((1, 2)) + 1  # (N,)
        apart = apart + (labels * span[:, None])[..., None]
    kept = _kept(apart, scores.float(), iou_threshold(nms), limit)
    count = min(limit, static(scores.shape[1]))
    best, index = (scores * kept).topk(count, 1)
    present = best > 0
    boxes = take(boxes, index) * present[..., None]
    labels = torch.where(present, labels.gather(1, index), -1)
    missing = limit - count
    return Candidates(
        F.pad(boxes, (0, 0, 0, missing)),
        F.pad(best, (0, missing)),
        F.pad(labels, (0, missing), value=-1),
    )


def _kept(boxes: Tensor, scores: Tensor, iou: float, limit: int) -> Tensor:
    """Return 1 for boxes that NMS leaves and 0 for others, (N, M) like ``scores``."""
    if torch.onnx.is_in_onnx_export():
        index = _OnnxNms.apply(boxes, scores[:, None], iou, limit)
    else:
        index = _nms(boxes, scores, iou, limit)
    place = index[:, 0] * scores.shape[1] + index[:, 2]
    flat = torch.zeros_like(scores).flatten()
    return flat.scatter(0, place, 1.0).reshape(scores.shape)


@torch.jit.script
def _nms(boxes: Tensor, scores: Tensor, iou: float, limit: int) -> Tensor:
    """Return image, 0 and box of what NMS leaves, (L, 3), as ONNX does.

    Scripted, so that a traced graph loops over as many images as it is given.
    """
    results = []
    for image in range(boxes.shape[0]):
        index = torch.nonzero(scores[image] > 0)[:, 0]
        kept = torch.ops.torchvision.nms(boxes[image][index], scores[image][index], iou)
        kept = index[kept][:limit]
        images = torch.full_like(kept, image)
        results.append(torch.stack([images, torch.zeros_like(kept), kept], 1))
    return torch.cat(results)


class _OnnxNms(torch.autograd.Function):
    """The op of ONNX, which takes a batch of images; torchvision's takes one image."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou: float, limit: int) -> Any:
        return _nms(boxes, scores[:, 0], iou, limit)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou: float, limit: int) -> Any:
        limits = [torch.tensor([limit]), torch.tensor([iou]), torch.tensor([0.0])]
        constants = [g.op('Constant', value_t=limit) for limit in limits]
        return g.op('NonMaxSuppression', boxes, scores, *constants)
