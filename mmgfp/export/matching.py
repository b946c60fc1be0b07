"""Detections of two sides, matched one to one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou


@dataclass(frozen=True)
class Detections:
    """Detections in one image.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels, (K, 4).
        scores: (K,).
        labels: Classes, (K,).
        masks: Which pixels of the image are the object's, (K, H, W), or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class Tolerance:
    """How far two sides may be apart.

    Attributes:
        box: Pixels that a side of a box may move.
        score: Difference of scores; raw outputs may differ by this times their largest
            value.
        mask: Pixels of a mask that may differ, as a share of both masks together.
    """

    box: float = 0.1
    score: float = 1e-3
    mask: float = 0.02


@dataclass(frozen=True)
class Limits:
    """Bounds on the detections that a detector keeps.

    Attributes:
        score: Scores below are dropped.
        iou: Of two boxes of a class that overlap more, NMS drops one.
        count: Detections of an image.
    """

    score: float
    iou: float
    count: int


@dataclass(frozen=True)
class Matching:
    """Outcome of a comparison.

    Attributes:
        pairs: Detections that both sides have: (in the first, in the second).
        box: Largest difference of sides of boxes, in pixels.
        score: Largest difference of scores.
        mask: Largest share of pixels of a mask that differ.
        borderline: Number of detections that one side alone has, and may have.
        missing: Detections of the first side that the second lacks, and should have.
        extra: Detections of the second side that the first lacks, and should have.
    """

    pairs: tuple[tuple[int, int], ...]
    box: float
    score: float
    mask: float
    borderline: int
    missing: tuple[int, ...]
    extra: tuple[int, ...]


def match(
    first: Detections, second: Detections, limits: Limits, tolerance: Tolerance
) -> Matching:
    """Match detections by class, box and score.

    Rounding decides about a detection, and one side alone may have it, if its score is
    within the tolerance of the threshold, or of the last one where the list is full; if
    a box of the same class whose score is as good overlaps it, so that either may
    suppress the other; or if a better one of its class overlaps it just as much as NMS
    allows.

    Args:
        first: What is expected.
        second: What is compared with it.
        limits: What the detector keeps.
        tolerance: How far the sides may be apart.
    """
    pairs, free = _pair(first, second, tolerance)
    alone = sorted(set(range(len(first.scores))) - {i for i, _ in pairs}), sorted(free)
    sides = ((first, second), (second, first))
    missing, extra = (
        tuple(i for i in left if not _is_borderline(*side, i, limits, tolerance))
        for side, left in zip(sides, alone, strict=True)
    )
    ours, theirs = np.array(pairs, dtype=int).reshape(-1, 2).T
    boxes = np.abs(first.boxes[ours] - second.boxes[theirs]).max(initial=0.0)
    scores = np.abs(first.scores[ours] - second.scores[theirs]).max(initial=0.0)
    masks = 0.0
    if first.masks is not None and second.masks is not None:
        masks = max(
            (_mask_difference(first.masks[i], second.masks[j]) for i, j in pairs),
            default=0.0,
        )
    return Matching(
        tuple(pairs),
        float(boxes),
        float(scores),
        masks,
        len(alone[0]) + len(alone[1]) - len(missing) - len(extra),
        missing,
        extra,
    )


def _pair(
    first: Detections, second: Detections, tolerance: Tolerance
) -> tuple[list[tuple[int, int]], set[int]]:
    """Return pairs, best scores first, and what is left of the second side."""
    free = set(range(len(second.scores)))
    pairs = []
    for i in np.argsort(-first.scores, kind='stable'):
        moved = np.abs(second.boxes - first.boxes[i]).max(1, initial=0.0)
        differs = np.abs(second.scores - first.scores[i])
        fits = (second.labels == first.labels[i]) & (moved <= tolerance.box)
        fits &= differs <= tolerance.score
        chosen = min(
            (j for j in np.flatnonzero(fits) if j in free),
            key=lambda j: (moved[j], differs[j]),
            default=None,
        )
        if chosen is not None:
            free.remove(chosen)
            pairs.append((int(i), int(chosen)))
    return pairs, free


def _is_borderline(
    side: Detections, other: Detections, i: int, limits: Limits, tolerance: Tolerance
) -> bool:
    """Return whether rounding decides that a detection is on one side alone."""
    score = side.scores[i]
    if score <= limits.score + tolerance.score:
        return True
    for each in (side, other):
        is_full = len(each.scores) >= limits.count
        if is_full and score <= each.scores.min() + tolerance.score:
            return True
    for each in (side, other):
        same = each.labels == side.labels[i]
        if each is side:
            same[i] = False
        overlaps = _overlaps(side.boxes[i], each.boxes)
        as_good = np.abs(each.scores - score) <= tolerance.score
        if each is other and (same & as_good & (overlaps > limits.iou)).any():
            return True
        better = each.scores >= score - tolerance.score
        at_edge = np.abs(overlaps - limits.iou) <= 1e-3
        if (same & better & at_edge).any():
            return True
    return False


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    one = torch.from_numpy(np.asarray(box, dtype=np.float64))[None]
    many = torch.from_numpy(np.asarray(boxes, dtype=np.float64)).reshape(-1, 4)
    return box_iou(one, many)[0].numpy()


def _mask_difference(first: np.ndarray, second: np.ndarray) -> float:
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first ^ second) / union) if union else 0.0
