"""A small made-up batch for a config, so that a model can be traced without data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmgfp.utils.errors import ConfigError

#: Data preprocessors of batches that are not made up here.
NOT_IMAGES = {
    'TrackDataPreprocessor': 'videos of tracked objects',
    'ReIDDataPreprocessor': 'crops of tracked objects',
    'MultiBranchDataPreprocessor': 'labelled and unlabelled branches',
}


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model without looking for pretrained weights.

    Raises:
        ConfigError: The config has no model.
    """
    if 'model' not in cfg:
        raise ConfigError('config', 'one with a model', 'none', 'give a model config')
    init_default_scope(_scope(cfg) or 'mmengine')
    model_cfg = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:  # as the runner does
        model_cfg.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    for node in _dicts(model_cfg):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and 'checkpoint' in init_cfg:  # of any type
            node['init_cfg'] = None
        for key in ('teacher_ckpt', 'pretrained'):
            if isinstance(node.get(key), str):
                node[key] = None
        if node.get('type') in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'  # the same weights, and no need of several GPUs
    model = MODELS.build(model_cfg)
    model.train()  # returns nothing where distillation overrides it
    return model


def demo_batch(
    cfg: Config, images: int = 2, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """A batch as the train dataloader of ``cfg`` would give it.

    Args:
        cfg: A config of MMDetection or MMPretrain.
        images: Number of images N.
        size: (H, W); by default the one that the model insists on, or a small one.

    Raises:
        ConfigError: The config belongs to another library, or trains on other data than
            images.
    """
    made_of = next((n for n in _values(cfg.model, 'type', str) if n in NOT_IMAGES), '')
    if made_of:
        expected = 'one for images with boxes or labels'
        got = f'{made_of}, for {NOT_IMAGES[made_of]}'
        raise ConfigError('data_preprocessor', expected, got, 'give a real batch')
    scope = _scope(cfg)
    if scope == 'mmpretrain':
        return _classification_batch(cfg, images, size)
    if scope == 'mmdet':
        return _detection_batch(cfg, images, size or _anchored_size(cfg))
    raise ConfigError(
        'default_scope', 'mmdet or mmpretrain', repr(scope), 'give such a config'
    )


def _scope(cfg: Config) -> str | None:
    """The config's scope, or the installed library that its file lies in."""
    folders = Path(cfg.filename or '').parts
    library = next((n for n in ('mmdet', 'mmpretrain') if n in folders), None)
    return cfg.get('default_scope') or library


def _anchored_size(cfg: Config) -> tuple[int, int]:
    """Size (H, W) that the model's anchors insist on, or a small one."""
    sizes = [node.get('input_size') for node in _dicts(cfg.model)]
    side = next((s for s in sizes if isinstance(s, int)), 128)
    return side, side


def _classification_batch(
    cfg: Config, images: int, size: tuple[int, int] | None
) -> dict[str, Any]:
    """Noise through the config's own pipeline, with views, masks and mixed labels."""
    from mmengine.dataset import Compose, default_collate

    rng = np.random.default_rng(0)
    mean = (cfg.get('data_preprocessor') or {}).get('mean') or (0, 0, 0)
    shape = (*(size or (256, 256)), len(mean))
    classes = next((int(n) for n in _values(cfg.model, 'num_classes', int)), 2)
    transform = Compose([{'type': 'PackInputs'}] if size else _transforms(cfg))
    samples = []
    for i in range(images):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        sample: dict[str, Any] = {'img': image[..., 0] if len(mean) == 1 else image}
        sample |= {k: image.shape[:2] for k in ('img_shape', 'ori_shape')}
        samples.append(transform(sample | {'gt_label': i % classes}))
    return default_collate(samples)


def _transforms(cfg: Config) -> list[dict[str, Any]]:
    """The pipeline after loading; of testing where there is no training."""
    for loader in ('train_dataloader', 'test_dataloader', 'val_dataloader'):
        for node in _dicts(cfg.get(loader) or {}):
            if node.get('pipeline'):
                return [s for s in node['pipeline'] if 'Load' not in str(s['type'])]
    return [
        {'type': 'Resize', 'scale': (224, 224)},
        {'type': 'PackInputs'},
    ]


def _detection_batch(cfg: Config, images: int, size: tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs

    classes = min((int(n) for n in _values(cfg.model, 'num_classes', int)), default=2)
    panoptic = any('Panoptic' in str(node.get('type')) for node in _dicts(cfg))
    proposals = any('LoadProposals' in str(node.get('type')) for node in _dicts(cfg))
    batch = demo_mm_inputs(
        images,
        [[3, *size]] * images,
        num_items=[3] * images,
        num_classes=2,
        use_box_type=True,
        with_mask=panoptic or _asks_for(cfg, 'with_mask'),
        with_semantic=panoptic or _asks_for(cfg, 'with_seg'),
    )
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes.tensor
        sample.gt_instances.labels = torch.arange(len(boxes)) % classes
        # Boxes as large as the anchors, so that heads see positive samples.
        boxes[:] = _spread_boxes(len(boxes), size)
        if proposals:
            sample.proposals = InstanceData(bboxes=boxes.clone())
        if 'gt_sem_seg' in sample:
            stripes = torch.arange(size[1]).expand(1, *size) % classes
            sample.gt_sem_seg.sem_seg = stripes.to(torch.uint8)
    return batch


def _asks_for(cfg: Config, annotation: str) -> bool:
    """Whether the config loads this kind of annotation."""
    return any(node.get(annotation) is True for node in _dicts(cfg))


def _spread_boxes(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Boxes (x1, y1, x2, y2) from a quarter to the whole of the image, (count, 4)."""
    height, width = size
    share = torch.linspace(0.25, 1.0, count)
    zeros = torch.zeros(count)
    return torch.stack([zeros, zeros, share * width, share * height], 1)


def init_weights(model: Any) -> None:
    """Give weights the first values of their config, without a log of each one."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    model.init_weights()
    logger.setLevel(level)


def _dicts(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | Config | ConfigDict):
        yield node
        for value in node.values():
            yield from _dicts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _dicts(value)


def _values(node: Any, key: str, kind: type) -> Iterator[Any]:
    return (d[key] for d in _dicts(node) if isinstance(d.get(key), kind))
