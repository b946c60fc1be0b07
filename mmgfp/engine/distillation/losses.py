"""How far the outputs of a student are from those of its teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

#: Added to areas, so that an empty box is at no distance from itself.
EMPTY = 1e-6


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T² · KL(teacher ‖ student)`` of two softmaxes (Hinton et al. 2015).

    The factor keeps gradients as large as those of the labels at any temperature
    (arXiv 1503.02531, section 2).

    Args:
        student: Logits, (..., K).
        teacher: Logits, (..., K).
        temperature: T, which both are divided by.

    Returns:
        Tensor: The divergences, (...).

    Examples:
        Of a fair coin from one that falls on one side three times out of four:
        1/2 ln(2/3) + 1/2 ln(2) = 0.1438.

        >>> fair, unfair = torch.tensor([0.0, 0.0]), torch.tensor([0.75, 0.25]).log()
        >>> round(softmax_divergence(unfair, fair, 1.0).item(), 4)
        0.1438
    """
    ours, theirs = (
        F.log_softmax(x.float() / temperature, -1) for x in (student, teacher)
    )
    divergence = F.kl_div(ours, theirs, reduction='none', log_target=True).sum(-1)
    return temperature**2 * divergence


def sigmoid_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``KL(teacher ‖ student)`` of sigmoids, of the shape of the logits."""
    student, teacher = student.float(), teacher.float()
    target = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, target, reduction='none')
    own = F.binary_cross_entropy_with_logits(teacher, target, reduction='none')
    return cross - own


def overlap_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the IoU of boxes about the same points.

    Args:
        student: Distances of a point to left, top, right and bottom, (..., 4).
        teacher: The same of the teacher, (..., 4).

    Returns:
        Tensor: The distances in [0, 1], (...).

    Examples:
        >>> box, half = torch.tensor([1.0, 1, 1, 1]), torch.tensor([1.0, 1, 0, 1])
        >>> round(overlap_distance(half, box).item(), 4)
        0.5
    """
    student, teacher = student.float().clamp(min=0), teacher.float().clamp(min=0)
    areas = [_area(x) for x in (student, teacher)]
    common = _area(torch.minimum(student, teacher))
    union = areas[0] + areas[1] - common
    return 1 - (common + EMPTY) / (union + EMPTY)


def _area(sides: Tensor) -> Tensor:
    width, height = sides[..., 0] + sides[..., 2], sides[..., 1] + sides[..., 3]
    return width * height


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the correlation of feature maps, averaged over channels.

    As in PKD (Cao et al. 2022, arXiv 2207.02039), channels are normalised first, so
    that neither their scale nor their offset matters.

    Args:
        student: Features, (N, C, H, W).
        teacher: Features, (N, C, H, W).

    Returns:
        Tensor: A scalar in [0, 2].
    """
    ours, theirs = (_normalised(x.float()) for x in (student, teacher))
    return (ours - theirs).square().mean() / 2


def _normalised(features: Tensor) -> Tensor:
    """Return channels with a mean of zero and a variance of one, (C, N·H·W)."""
    rows = features.transpose(0, 1).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + 1e-6).rsqrt()
