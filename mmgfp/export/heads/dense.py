"""Detections of one-stage heads, and proposals of RPNs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead, RPNHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.coders import (
    DeltaXYWHBBoxCoder,
    DistancePointBBoxCoder,
    TBLRBBoxCoder,
)
from torch import Tensor

from mmgfp.export.heads.candidates import (
    Candidates,
    best_pairs,
    rows,
    static,
    suppress,
    take,
    without_small,
)
from mmgfp.export.heads.coders import (
    clip,
    decode_cells,
    decode_deltas,
    decode_distances,
    decode_sides,
)
from mmgfp.export.heads.support import (
    check_nms,
    inherits,
    positive,
    refuse,
    require_inherited,
)

#: Results per image of heads whose config sets no limit.
DEFAULT_LIMIT = 300
#: How a coder turns priors and regressed values into boxes.
CODERS: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    DeltaXYWHBBoxCoder: decode_deltas,
    DistancePointBBoxCoder: decode_distances,
    TBLRBBoxCoder: decode_sides,
}


@dataclass(frozen=True)
class Level:
    """Outputs of a head on one level of features, one row per prior.

    Attributes:
        priors: Points or anchors of the level, (A, 2) or (A, 4), in pixels.
        stride: Pixels of the image per pixel of the level.
        logits: Scores of classes before their activation, (N, A, C).
        values: What is regressed, (N, A, 4) or as wide as the head regresses.
        factor: Centerness, objectness or the like before its sigmoid, (N, A, 1), or
            None.
    """

    priors: Tensor
    stride: float
    logits: Tensor
    values: Tensor
    factor: Tensor | None


def levels_of(head: Any, outputs: tuple) -> list[Level]:
    """Return what ``head.forward`` gave, level by level.

    Args:
        head: A dense head.
        outputs: Scores, regressed values and possibly factors, a list of levels each.
    """
    scores, values, *factors = outputs
    generator = head.prior_generator
    priors = generator.grid_priors(
        [tuple(map(static, s.shape[-2:])) for s in scores],
        dtype=scores[0].dtype,
        device=scores[0].device,
        **({'with_stride': True} if isinstance(head, YOLOXHead) else {}),
    )
    levels = []
    for i, score in enumerate(scores):
        count = len(priors[i])
        logits = rows(score, head.cls_out_channels)
        width = static(values[i].shape[1] * values[i].shape[2] * values[i].shape[3])
        regressed = rows(values[i], width // count)
        factor = rows(factors[0][i], 1) if factors else None
        stride = float(generator.strides[i][0])
        levels.append(Level(priors[i], stride, logits, regressed, factor))
    return levels


def detect(head: Any, outputs: tuple, size: tuple[int, int]) -> Candidates:
    """Return the detections of a head that `check_dense` lets pass.

    Args:
        head: A dense head.
        outputs: What its ``forward`` gave.
        size: (H, W) of the image, in pixels.
    """
    cfg = head.test_cfg
    levels = levels_of(head, outputs)
    kind = kind_of(head)
    if kind.selects:
        parts = [_selected(head, level, cfg, kind, size) for level in levels]
    else:
        parts = [_every_prior(level, cfg) for level in levels]
    candidates = Candidates(*(torch.cat(p, 1) for p in zip(*parts, strict=True)))
    if kind.selects:
        candidates = without_small(candidates, cfg)
    return suppress(candidates, cfg.nms, limit_of(head))


def propose(head: Any, outputs: tuple, size: tuple[int, int]) -> Candidates:
    """Return the proposals of a RPN, suppressed on each level by itself.

    Args:
        head: A RPN that `check_rpn` lets pass.
        outputs: What its ``forward`` gave.
        size: (H, W) of the image, in pixels.
    """
    cfg, parts = head.test_cfg, []
    for number, level in enumerate(levels_of(head, outputs)):
        part = _selected(head, level, cfg, STANDARD, size)
        # The level takes the place of the class: NMS keeps levels apart.
        parts.append(part._replace(labels=torch.full_like(part.labels, number)))
    candidates = Candidates(*(torch.cat(p, 1) for p in zip(*parts, strict=True)))
    candidates = without_small(candidates, cfg)
    return suppress(candidates, cfg.nms, cfg.max_per_img)


def _selected(
    head: Any, level: Level, cfg: Any, kind: Kind, size: tuple[int, int]
) -> Candidates:
    """Return the pairs of prior and class with the best scores on a level."""
    if head.use_sigmoid_cls:
        logits, activate = level.logits, torch.sigmoid
    else:
        logits, activate = level.logits.softmax(-1)[..., :-1], torch.nn.Identity()
    best, index, labels = best_pairs(logits, cfg.nms_pre)
    scores = activate(best)
    scores = torch.where(scores > cfg.get('score_thr', 0), scores, 0.0)
    if level.factor is not None:
        scores = scores * take(level.factor, index)[..., 0].sigmoid()
    boxes = kind.boxes(head, level, level.priors[index], take(level.values, index))
    if head.bbox_coder.clip_border:
        boxes = clip(boxes, size)
    return Candidates(boxes, scores, labels)


def _every_prior(level: Level, cfg: Any) -> Candidates:
    """Return one candidate per prior, of its best class, as YOLOX does."""
    assert level.factor is not None
    scores, labels = level.logits.max(-1)
    scores = scores.sigmoid() * level.factor[..., 0].sigmoid()
    scores = torch.where(scores >= cfg.score_thr, scores, 0.0)
    return Candidates(decode_cells(level.priors, level.values), scores, labels)


def _coded(head: Any, level: Level, priors: Tensor, values: Tensor) -> Tensor:
    return CODERS[type(head.bbox_coder)](head.bbox_coder, priors, values)


def _integrated(head: Any, level: Level, priors: Tensor, values: Tensor) -> Tensor:
    """Return boxes of a head that regresses distributions of distances, as GFL."""
    points = head.anchor_center(priors)
    distances = head.integral(values).reshape(*points.shape[:-1], 4)
    return _coded(head, level, points, distances * level.stride)


@dataclass(frozen=True)
class Kind:
    """How a family of heads turns outputs into boxes and scores.

    Attributes:
        base: The class whose methods say so in MMDetection.
        methods: Those methods; a head that overrides one is not of this kind.
        selects: Whether the best pairs of prior and class are picked on each level.
        boxes: Boxes of a head, a level, priors and regressed values.
    """

    base: type
    methods: tuple[str, ...]
    selects: bool = True
    boxes: Callable[[Any, Level, Tensor, Tensor], Tensor] = _coded


SHARED = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
#: RetinaNet, FSAF, ATSS, FCOS, RTMDet, SSD and others that predict as the base class.
STANDARD = Kind(BaseDenseHead, SHARED)
KINDS = (
    STANDARD,
    Kind(GFLHead, SHARED, boxes=_integrated),
    Kind(
        YOLOXHead,
        ('predict', 'predict_by_feat', '_bbox_decode', '_bbox_post_process'),
        selects=False,
    ),
)


def kind_of(head: Any) -> Kind:
    """Return how a head's outputs are read.

    Raises:
        ConfigError: If the head predicts in a way that is not known here.
    """
    for kind in KINDS:
        if inherits(head, kind.base, *kind.methods):
            return kind
    raise refuse(
        'bbox_head',
        'one that predicts as RetinaNet, FCOS, ATSS, GFL, RTMDet, SSD or YOLOX do',
        type(head).__name__,
    )


def limit_of(head: Any) -> int:
    """Return the number of results per image."""
    return head.test_cfg.get('max_per_img', DEFAULT_LIMIT)


def check_dense(head: Any) -> None:
    """Refuse a head whose results a graph could not repeat.

    Raises:
        ConfigError: If its class, its coder or its ``test_cfg`` is not supported.
    """
    kind = kind_of(head)
    _check_options(head, 'bbox_head', kind)
    if 'max_per_img' in head.test_cfg or kind.selects:
        positive(head.test_cfg, 'max_per_img', 'bbox_head.test_cfg')


def check_rpn(head: Any) -> None:
    """Refuse a RPN whose proposals a graph could not repeat.

    Raises:
        ConfigError: If its class, its coder or its ``test_cfg`` is not supported.
    """
    require_inherited('rpn_head', head, RPNHead, *SHARED)
    _check_options(head, 'rpn_head', STANDARD)
    positive(head.test_cfg, 'max_per_img', 'rpn_head.test_cfg')


def _check_options(head: Any, name: str, kind: Kind) -> None:
    cfg = head.test_cfg
    check_nms(cfg, f'{name}.test_cfg')
    if not kind.selects:
        return
    positive(cfg, 'nms_pre', f'{name}.test_cfg')
    check_coder(head, name)
    loss = getattr(head, 'loss_cls', None)  # SSD has none
    if getattr(loss, 'custom_cls_channels', False):
        expected = 'one with a sigmoid or softmax'
        raise refuse(f'{name}.loss_cls', expected, type(loss).__name__)


def check_coder(head: Any, name: str) -> None:
    """Refuse a coder that no function here decodes like.

    Raises:
        ConfigError: If it is none of `CODERS`.
    """
    coder = type(head.bbox_coder)
    if coder not in CODERS:
        known = ' or '.join(c.__name__ for c in CODERS)
        raise refuse(f'{name}.bbox_coder', known, coder.__name__)
