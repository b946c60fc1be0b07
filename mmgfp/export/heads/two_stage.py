"""Detections and masks of two-stage detectors."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor
from torchvision.ops import roi_align

from mmgfp.export.heads.candidates import Candidates, static, suppress
from mmgfp.export.heads.coders import clip, decode_deltas
from mmgfp.export.heads.dense import check_coder, check_rpn
from mmgfp.export.heads.support import (
    check_nms,
    positive,
    refuse,
    require_inherited,
)


def classify(
    roi_head: Any, features: tuple[Tensor, ...], proposals: Candidates, size: Any
) -> Candidates:
    """Return the detections among proposals.

    Args:
        roi_head: A RoI head that `check_two_stage` lets pass.
        features: Levels of features (N, C, H, W).
        proposals: P of them per image.
        size: (H, W) of the image, in pixels.
    """
    head, cfg = roi_head.bbox_head, roi_head.test_cfg
    rois = rois_of(proposals.boxes)
    pooled = extract(roi_head.bbox_roi_extractor, features, rois)
    if roi_head.with_shared_head:
        pooled = roi_head.shared_head(pooled)
    logits, deltas = head(pooled)
    count = static(proposals.boxes.shape[1])
    scores = logits.softmax(-1)[:, :-1].reshape(-1, count, head.num_classes)
    deltas = deltas.reshape(scores.shape[0], count, -1, 4)
    boxes = decode_deltas(head.bbox_coder, proposals.boxes[:, :, None], deltas)
    if head.bbox_coder.clip_border:
        boxes = clip(boxes, size)
    # Places of proposals that are none hold boxes of zeros.
    above = (scores > cfg.score_thr) & (proposals.scores > 0)[..., None]
    scores = torch.where(above, scores, 0.0)
    labels = torch.arange(head.num_classes, device=scores.device).expand_as(scores)
    boxes = boxes.expand(-1, -1, head.num_classes, -1)
    candidates = Candidates(boxes.flatten(1, 2), scores.flatten(1), labels.flatten(1))
    return suppress(candidates, cfg.nms, cfg.max_per_img)


def segment(
    roi_head: Any, features: tuple[Tensor, ...], detections: Candidates
) -> Tensor:
    """Return masks (N, K, h, w) of detections, as probabilities in their boxes.

    Places of detections that are none hold zeros.
    """
    head = roi_head.mask_head
    boxes, _, labels = (d.flatten(0, 1) for d in detections)
    index = torch.nonzero(labels >= 0)[:, 0]
    rois = rois_of(detections.boxes)[index]
    pooled = extract(roi_head.mask_roi_extractor, features, rois)
    if roi_head.with_shared_head:
        pooled = roi_head.shared_head(pooled)
    masks = head(pooled).sigmoid()  # (L, classes, h, w)
    if head.class_agnostic:
        masks = masks[:, 0]
    else:
        masks = masks[torch.arange(masks.shape[0]), labels[index]]
    blank = masks.new_zeros(boxes.shape[0], *map(static, masks.shape[1:]))
    masks = blank.index_put((index,), masks)
    return masks.reshape(*detections.labels.shape, *masks.shape[1:])


def rois_of(boxes: Tensor) -> Tensor:
    """Return boxes (N, P, 4) as RoIs (N * P, 5): number of the image, corners."""
    images = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)
    images = images[:, None, None].expand(-1, static(boxes.shape[1]), 1)
    return torch.cat([images, boxes], -1).flatten(0, 1)


def extract(extractor: Any, features: tuple[Tensor, ...], rois: Tensor) -> Tensor:
    """Return features (R, C, h, w) of RoIs (R, 5), each from the level of its size."""
    layers = extractor.roi_layers
    if len(layers) == 1:
        return _align(layers[0], features[0], rois)
    levels = extractor.map_roi_levels(rois, len(layers))
    index = [torch.nonzero(levels == i)[:, 0] for i in range(len(layers))]
    pooled = torch.cat(
        [
            _align(layer, feature, rois[i])
            for layer, feature, i in zip(layers, features, index, strict=False)
        ]
    )
    order = torch.cat(index)
    back = torch.arange(rois.shape[0], device=rois.device)
    return pooled[torch.zeros_like(order).scatter(0, order, back)]


def _align(layer: RoIAlign, features: Tensor, rois: Tensor) -> Tensor:
    """Return what mmcv's layer does, by an op that exporters know."""
    return roi_align(
        features,
        rois,
        layer.output_size,
        layer.spatial_scale,
        layer.sampling_ratio,
        layer.aligned,
    )


def check_two_stage(model: Any) -> None:
    """Refuse a detector whose results a graph could not repeat.

    Raises:
        ConfigError: If the class of a part or an option is not supported.
    """
    check_rpn(model.rpn_head)
    roi_head = model.roi_head
    require_inherited(
        'roi_head',
        roi_head,
        StandardRoIHead,
        *('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward'),
    )
    _check_box_head(roi_head.bbox_head)
    check_nms(roi_head.test_cfg, 'roi_head.test_cfg')
    positive(roi_head.test_cfg, 'max_per_img', 'roi_head.test_cfg')
    _check_extractor('bbox_roi_extractor', roi_head.bbox_roi_extractor)
    if roi_head.with_mask:
        methods = ('predict_by_feat', '_predict_by_feat_single')
        require_inherited('mask_head', roi_head.mask_head, FCNMaskHead, *methods)
        _check_extractor('mask_roi_extractor', roi_head.mask_roi_extractor)


def _check_box_head(head: Any) -> None:
    methods = ('predict_by_feat', '_predict_by_feat_single')
    require_inherited('bbox_head', head, BBoxHead, *methods)
    check_coder(head, 'bbox_head')
    if head.custom_cls_channels or not head.with_reg:
        got = f'{type(head).__name__} with {type(head.loss_cls).__name__}'
        raise refuse('bbox_head', 'one with softmax classes and boxes', got)


def _check_extractor(name: str, extractor: Any) -> None:
    methods = ('forward', 'map_roi_levels')
    require_inherited(name, extractor, SingleRoIExtractor, *methods)
    for layer in extractor.roi_layers:
        if type(layer) is not RoIAlign or layer.pool_mode != 'avg':
            raise refuse(f'{name}.roi_layer', 'RoIAlign of averages', repr(layer))
