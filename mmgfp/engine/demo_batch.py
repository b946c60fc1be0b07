"""A small made-up batch for a config, so that a model can be traced without data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmgfp.errors import ConfigError


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model without looking for pretrained weights.

    Raises:
        ConfigError: The config has no model.
    """
    if 'model' not in cfg:
        raise ConfigError('config', 'a model', 'none', 'give a model config')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model_cfg = copy.deepcopy(cfg.model)
    for node in _dicts(model_cfg):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            node['init_cfg'] = None
    return MODELS.build(model_cfg).train()


def demo_batch(
    cfg: Config, images: int = 2, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """A batch as the train dataloader of ``cfg`` would give it.

    Args:
        cfg: A config of MMDetection or MMPretrain.
        images: Number of images N.
        size: (H, W); by default the one that the model insists on, or a small one.

    Raises:
        ConfigError: The config belongs to another library.
    """
    scope = cfg.get('default_scope') or _library(cfg.filename)
    size = size or _input_size(cfg, scope)
    if scope == 'mmpretrain':
        return _classification_batch(cfg, images, size)
    if scope == 'mmdet':
        return _detection_batch(cfg, images, size)
    raise ConfigError(
        'default_scope', 'mmdet or mmpretrain', repr(scope), 'give such a config'
    )


def _library(filename: str | None) -> str | None:
    """The installed library that a config file lies in."""
    folders = Path(filename or '').parts
    return next((n for n in ('mmdet', 'mmpretrain') if n in folders), None)


def _input_size(cfg: Config, scope: str | None) -> tuple[int, int]:
    """Size (H, W) of the images that the config's model is made for."""
    for key in ('input_size', 'img_size'):  # of SSD's anchors, of transformers
        for node in _dicts(cfg.model):
            if isinstance(node.get(key), int):
                return node[key], node[key]
    if scope != 'mmpretrain':
        return 128, 128
    pipeline = cfg.get('train_pipeline') or cfg.get('test_pipeline') or ()
    for step in pipeline:
        for key in ('crop_size', 'scale'):
            if isinstance(step.get(key), int):
                return step[key], step[key]
    return 224, 224


def _classification_batch(cfg: Config, images: int, size: tuple[int, int]) -> dict:
    from mmpretrain.structures import DataSample

    classes = next((int(n) for n in _values(cfg.model, 'num_classes')), 2)
    generator = torch.Generator().manual_seed(0)
    mean = (cfg.get('data_preprocessor') or {}).get('mean') or (0, 0, 0)
    shape = (images, len(mean), *size)
    pixels = torch.randint(0, 256, shape, generator=generator)
    labels = [i % classes for i in range(images)]
    samples = [
        DataSample(metainfo={'img_shape': size}).set_gt_label(label) for label in labels
    ]
    return {'inputs': pixels.to(torch.uint8), 'data_samples': samples}


def _detection_batch(cfg: Config, images: int, size: tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs

    classes = min((int(n) for n in _values(cfg.model, 'num_classes')), default=2)
    kinds = {node.get('type') for node in _dicts(cfg)}
    batch = demo_mm_inputs(
        images,
        [[3, *size]] * images,
        num_items=[3] * images,
        num_classes=max(classes - 1, 1),
        use_box_type=True,
        with_mask=any('mask_head' in node for node in _dicts(cfg.model)),
        with_semantic=any('Semantic' in str(k) or 'Panoptic' in str(k) for k in kinds),
    )
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes.tensor
        # Boxes as large as the anchors, so that heads see positive samples.
        boxes[:] = _spread_boxes(len(boxes), size)
    return batch


def _spread_boxes(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Boxes (x1, y1, x2, y2) from a quarter to the whole of the image, (count, 4)."""
    height, width = size
    share = torch.linspace(0.25, 1.0, count)
    zeros = torch.zeros(count)
    return torch.stack([zeros, zeros, share * width, share * height], 1)


def _dicts(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | Config | ConfigDict):
        yield node
        for value in node.values():
            yield from _dicts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _dicts(value)


def _values(node: Any, key: str) -> Iterator[Any]:
    return (d[key] for d in _dicts(node) if isinstance(d.get(key), int))
