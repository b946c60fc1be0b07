"""The parts of a model that are measured, each with its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from mmgfp.latency.timers import Piece
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.tree import tree_tensors

#: The side of a box on the finest level, as in MMDetection's extractors.
FINEST_SCALE = 56.0
#: RoIs per image where the config names no number.
PROPOSALS = 1000
DETECTIONS = 100


def pieces_of(model: Any, shape: Sequence[int], batch: int = 1) -> list[Piece]:
    """Return the parts of a model that make up its inference, but for NMS.

    A two-stage detector has two: backbone, neck and RPN on the image; RoIAlign and the
    heads on as many RoIs as testing hands on (`roi_counts`).

    Args:
        model: A model of MMDetection or MMPretrain, or any module that takes images
            (N, C, H, W); in eval mode.
        shape: Size (C, H, W) of an image.
        batch: Number of images.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, *shape, generator=generator)
    if not isinstance(getattr(model, 'roi_head', None), nn.Module):
        return [Piece(_Raw(model), (image,))]
    first = _FirstStage(model)
    with torch.no_grad():
        maps = [torch.zeros_like(m) for m in first.maps(image)]
    extractor = _extractor(model.roi_head)
    maps = maps[: len(extractor.featmap_strides)]
    rois = [_rois(n, shape, batch, len(maps)) for n in roi_counts(model).values()]
    inputs = (*maps, *(level for levels in rois for level in levels))
    return [Piece(first, (image,)), Piece(_SecondStage(model, len(maps)), inputs)]


def roi_counts(model: Any) -> dict[str, int]:
    """Return how many RoIs of an image each head works on when the model is tested.

    Examples:
        >>> roi_counts(nn.Conv2d(3, 8, 3))
        {}
    """
    roi_head = getattr(model, 'roi_head', None)
    if not isinstance(roi_head, nn.Module):
        return {}
    test_cfg: Any = getattr(model, 'test_cfg', None) or {}
    proposals = (test_cfg.get('rpn') or {}).get('max_per_img', PROPOSALS)
    counts = {'bbox_head': int(proposals)}
    if getattr(roi_head, 'with_mask', False):
        detections = (test_cfg.get('rcnn') or {}).get('max_per_img', DETECTIONS)
        counts['mask_head'] = int(detections)
    return counts


def _extractor(roi_head: Any, name: str = 'bbox_roi_extractor') -> Any:
    found = getattr(roi_head, name, None)
    if isinstance(found, nn.ModuleList):
        found = found[0]
    if not hasattr(found, 'featmap_strides') or not hasattr(found, 'roi_layers'):
        raise ConfigError(
            f'roi_head.{name}',
            'an extractor of one level for each RoI',
            type(found).__name__,
            'such a head cannot be profiled; take flops or memory as the target',
        )
    return found


def _rois(count: int, shape: Sequence[int], batch: int, levels: int) -> list[Tensor]:
    """Return made-up RoIs by level, (count, 5) in all: image and corners each."""
    generator = torch.Generator().manual_seed(count)
    height, width = shape[1:]
    side = torch.tensor([width, height])
    # Small boxes are as frequent as large ones, in octaves from 16 pixels.
    low = min(16.0, min(height, width) / 4) / max(height, width)
    share = low ** torch.rand(batch * count, 1, generator=generator)
    corner = torch.rand(batch * count, 2, generator=generator) * (1 - share)
    boxes = torch.cat([corner * side, (corner + share) * side], 1)
    images = torch.arange(batch).repeat_interleave(count)[:, None]
    scale = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level = torch.log2(scale / FINEST_SCALE + 1e-6).floor().clamp(0, levels - 1)
    rois = torch.cat([images.to(boxes), boxes], 1)
    return [rois[level == i] for i in range(levels)]


class _Raw(nn.Module):
    """The raw outputs of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return all outputs."""
        is_openmmlab = hasattr(self.model, 'data_preprocessor')
        options = {'mode': 'tensor'} if is_openmmlab else {}
        return tuple(tree_tensors(self.model(image, **options)))


class _FirstStage(nn.Module):
    """Backbone, neck and RPN."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def maps(self, image: Tensor) -> Sequence[Tensor]:
        """Return the feature maps."""
        return self.model.extract_feat(image)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps and what the RPN says of them."""
        maps = self.maps(image)
        rpn = getattr(self.model, 'rpn_head', None)
        outputs = () if rpn is None else tree_tensors(rpn(maps))
        return (*maps, *outputs)


class _SecondStage(nn.Module):
    """RoIAlign and the heads behind it."""

    def __init__(self, model: Any, levels: int) -> None:
        super().__init__()
        self.model = model
        self.levels = levels

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of all heads.

        Args:
            inputs: The maps of all levels, then by head the RoIs of each level.
        """
        roi_head, n = self.model.roi_head, self.levels
        maps, rois = inputs[:n], inputs[n : 2 * n]
        features = self._align('bbox_roi_extractor', maps, rois)
        if getattr(roi_head, 'with_shared_head', False):
            features = roi_head.shared_head(features)
        heads = roi_head.bbox_head
        heads = heads if isinstance(heads, nn.ModuleList) else [heads]
        outputs = [t for head in heads for t in tree_tensors(head(features))]
        if len(inputs) > 2 * n:
            features = self._align('mask_roi_extractor', maps, inputs[2 * n :])
            masks = roi_head.mask_head
            masks = masks if isinstance(masks, nn.ModuleList) else [masks]
            outputs += [t for head in masks for t in tree_tensors(head(features))]
        return tuple(outputs)

    def _align(
        self, name: str, maps: Sequence[Tensor], rois: Sequence[Tensor]
    ) -> Tensor:
        extractor = _extractor(self.model.roi_head, name)
        parts = [
            roi_align(
                feature,
                boxes,
                layer.output_size,
                layer.spatial_scale,
                max(int(getattr(layer, 'sampling_ratio', 0)), 0) or -1,
                bool(getattr(layer, 'aligned', True)),
            )
            for feature, boxes, layer in zip(
                maps, rois, extractor.roi_layers, strict=False
            )
        ]
        return torch.cat(parts)
