"""Distances of the maps of classes and boxes that dense heads put out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgfp.engine.distillation.losses import (
    overlap_distance,
    sigmoid_divergence,
    softmax_divergence,
)
from mmgfp.utils.errors import ConfigError

#: One list of maps for each kind of output: classes, boxes, and qualities if any.
Maps = Sequence[Sequence[Tensor]]


def compare_maps(
    head: Any, student: Maps, teacher: Maps, temperature: float, left_out: list[str]
) -> dict[str, Tensor]:
    """Return the distances of classes and boxes over all priors.

    Sums are divided by the teacher's number of objects: the sum of its confidence, the
    largest score of each prior. Boxes and qualities (centerness, objectness) count by
    that confidence, as where there is no object nothing has taught them.

    Args:
        head: The dense head of the teacher.
        student: Maps (N, A · C, H, W) by level, for classes, boxes and any qualities.
        teacher: The same of the teacher.
        temperature: Temperature of softmaxes.
        left_out: Reasons why something is not compared; new ones are added.

    Returns:
        dict: ``cls`` and, where boxes are understood, ``bbox``.

    Raises:
        ConfigError: If the maps have different shapes.
    """
    _check_maps(student, teacher)
    priors = head.prior_generator.num_base_priors
    (classes, target), boxes, *others = (
        (_rows(ours, priors), _rows(theirs, priors))
        for ours, theirs in zip(student, teacher, strict=True)
    )
    qualities = [pair for pair in others if pair[0].shape[-1] == 1]
    if len(qualities) < len(others):
        _note(left_out, f'further boxes of {_name(head)} are not compared')
    if head.use_sigmoid_cls:
        scores = target.sigmoid()
        divergence = sigmoid_divergence(classes, target).sum()
    else:
        scores = target.softmax(-1)[..., :-1]  # the last one is the background
        divergence = softmax_divergence(classes, target, temperature).sum()
    confidence = scores.amax(-1, keepdim=True)  # (N, P, 1)
    for _, theirs in qualities:
        confidence = confidence * theirs.sigmoid()
    for pair in qualities:
        divergence = divergence + (confidence * sigmoid_divergence(*pair)).sum()
    objects = confidence.sum().clamp(min=1)
    terms = {'cls': divergence / objects}
    distance = _box_distance(head, *boxes, temperature)
    if distance is None:
        _note(left_out, f'boxes of {_name(head)} are not compared: not 4 numbers each')
    else:
        terms['bbox'] = (confidence[..., 0] * distance).sum() / objects
    return terms


def _box_distance(
    head: Any, ours: Tensor, theirs: Tensor, temperature: float
) -> Tensor | None:
    """Return the distance of two boxes at each prior, (N, P), None if it is unknown.

    Distributions are compared as such (Localization Distillation, Zheng et al. 2022,
    arXiv 2102.12252); distances to the sides by the IoU, deltas by their difference.

    Args:
        head: The dense head.
        ours: Box outputs of the student, (N, P, B).
        theirs: Box outputs of the teacher, (N, P, B).
        temperature: Temperature of distributions.
    """
    numbers, bins = ours.shape[-1], getattr(head, 'reg_max', 0) + 1
    if bins > 1 and numbers == 4 * bins:
        ours, theirs = (x.unflatten(-1, (4, bins)) for x in (ours, theirs))
        return softmax_divergence(ours, theirs, temperature).mean(-1)
    if numbers != 4:
        return None
    coder = type(getattr(head, 'bbox_coder', None)).__name__
    if coder == 'DistancePointBBoxCoder':
        return overlap_distance(ours, theirs)
    return (ours - theirs).abs().mean(-1)


def _rows(maps: Sequence[Tensor], priors: Sequence[int]) -> Tensor:
    """Return maps (N, A · C, H, W) of all levels with a row for each prior."""
    return torch.cat(
        [
            m.float().permute(0, 2, 3, 1).reshape(len(m), -1, m.shape[1] // count)
            for m, count in zip(maps, priors, strict=True)
        ],
        1,
    )


def _check_maps(student: Maps, teacher: Maps) -> None:
    """Refuse a teacher whose maps are not of the student's shapes.

    Raises:
        ConfigError: If they are not.
    """
    ours, theirs = (
        [[tuple(m.shape) for m in maps] for maps in outputs]
        for outputs in (student, teacher)
    )
    if ours != theirs:
        raise ConfigError(
            'maps of the teacher',
            f'of the shapes of the model, {ours}'[:300],
            str(theirs)[:300],
            'give the unpruned model as teacher',
        )


def _note(left_out: list[str], reason: str) -> None:
    if reason not in left_out:
        left_out.append(reason)


def _name(head: Any) -> str:
    return type(head).__name__
