"""A small made-up batch for a config, so that a model can be traced without data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import nn

from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.config_search import dicts_in, scope_of, values_in
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import has_conv_attributes

#: Data preprocessors of batches that cannot be made up here, and what they are made of.
NOT_IMAGES = {
    'TrackDataPreprocessor': 'videos of tracked objects',
    'ReIDDataPreprocessor': 'crops of tracked objects',
    'MultiBranchDataPreprocessor': 'labelled and unlabelled branches',
}


def demo_calls(cfg: Config, model: nn.Module) -> BatchCalls:
    """Return the calls of the config's model on a made-up batch.

    Raises:
        ConfigError: If no batch can be made up for the config.
    """
    return BatchCalls(model, demo_batch(cfg, channels=image_channels(cfg, model)))


def image_channels(cfg: Config, model: nn.Module | None = None) -> int:
    """Return the number of channels of the images that a config's model reads.

    The backbone's ``in_channels`` tell it, or the means that are subtracted from an
    image; where neither does, the first convolution of the backbone.

    Args:
        cfg: A config, possibly of a `PrunedModel`.
        model: The model that was built from it; without one, the last way is closed.

    Examples:
        >>> backbone = dict(type='ResNet', in_channels=4)
        >>> image_channels(Config(dict(model=dict(backbone=backbone))))
        4
        >>> image_channels(Config(dict(data_preprocessor=dict(mean=[33.5]))))
        1
    """
    node = cfg.get('model') or {}
    node = node.get('architecture') or node.get('detector') or node
    declared = (node.get('backbone') or {}).get('in_channels')
    if isinstance(declared, int):
        return declared
    processors = (node.get('data_preprocessor'), cfg.get('data_preprocessor'))
    means = [p['mean'] for p in processors if p and p.get('mean')]
    # One mean may be that of a grey image, or one for all channels of any image.
    if means and len(means[0]) > 1:
        return len(means[0])
    return _stem_channels(model) or (len(means[0]) if means else 3)


def _stem_channels(model: Any) -> int | None:
    """Return the input channels of the backbone's first convolution, if it has one."""
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, nn.Module):
        return None
    names = (n for n, m in backbone.named_modules() if has_conv_attributes(m))
    name = next(names, None)
    if name is None:
        return None
    around = [
        type(m).__name__
        for n, m in backbone.named_modules()
        if name.startswith(f'{n}.')
    ]
    # YOLOX's first block stacks four neighbouring pixels as channels.
    conv: Any = backbone.get_submodule(name)
    return conv.in_channels // (4 if 'Focus' in around else 1)


def demo_batch(
    cfg: Config,
    images: int = 2,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Return a made-up batch like those of the train dataloader of ``cfg``.

    Args:
        cfg: A config of MMDetection or MMPretrain.
        images: Number of images N.
        size: (H, W); by default the one that the model insists on, or a small one.
        channels: Channels C of an image; those that the config tells by default.

    Raises:
        ConfigError: If the config belongs to another library, or trains on other data
            than images.
    """
    types = values_in(cfg.model, 'type', str)
    preprocessor = next((name for name in types if name in NOT_IMAGES), None)
    if preprocessor is not None:
        expected = 'one for images with boxes or labels'
        got = f'{preprocessor}, for {NOT_IMAGES[preprocessor]}'
        raise ConfigError('data_preprocessor', expected, got, 'give a real batch')
    scope = scope_of(cfg)
    channels = channels or image_channels(cfg)
    if scope == 'mmpretrain':
        return _classification_batch(cfg, images, size, channels)
    if scope == 'mmdet':
        return _detection_batch(cfg, images, (channels, *(size or _anchored_size(cfg))))
    raise ConfigError(
        'default_scope', 'mmdet or mmpretrain', repr(scope), 'give such a config'
    )


def _anchored_size(cfg: Config) -> tuple[int, int]:
    """Return the size (H, W) that the model's anchors insist on, or a small one."""
    sizes = [node.get('input_size') for node in dicts_in(cfg.model)]
    side = next((s for s in sizes if isinstance(s, int)), 128)
    return side, side


def _classification_batch(
    cfg: Config, images: int, size: tuple[int, int] | None, channels: int
) -> dict[str, Any]:
    """Send noise through the config's own pipeline: views, masks and mixed labels."""
    from mmengine.dataset import Compose, default_collate

    rng = np.random.default_rng(0)
    shape = (*(size or (256, 256)), channels)
    classes = next((int(n) for n in values_in(cfg.model, 'num_classes', int)), 2)
    transform = Compose([{'type': 'PackInputs'}] if size else _transforms(cfg))
    samples = []
    for i in range(images):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        sample: dict[str, Any] = {'img': image[..., 0] if channels == 1 else image}
        sample |= {k: image.shape[:2] for k in ('img_shape', 'ori_shape')}
        samples.append(transform(sample | {'gt_label': i % classes}))
    return default_collate(samples)


def _transforms(cfg: Config) -> list[dict[str, Any]]:
    """Return the pipeline after loading; of testing where there is no training."""
    for loader in ('train_dataloader', 'test_dataloader', 'val_dataloader'):
        for node in dicts_in(cfg.get(loader) or {}):
            if node.get('pipeline'):
                return [s for s in node['pipeline'] if 'Load' not in str(s['type'])]
    return [
        {'type': 'Resize', 'scale': (224, 224)},
        {'type': 'PackInputs'},
    ]


def _detection_batch(cfg: Config, images: int, shape: tuple[int, int, int]) -> dict:
    """Return noise with boxes, and the masks and proposals that the config loads."""
    from mmdet.testing import demo_mm_inputs

    classes = min((int(n) for n in values_in(cfg.model, 'num_classes', int)), default=2)
    panoptic = any('Panoptic' in str(node.get('type')) for node in dicts_in(cfg))
    proposals = any('LoadProposals' in str(node.get('type')) for node in dicts_in(cfg))
    batch = demo_mm_inputs(
        images,
        [list(shape)] * images,
        num_items=[3] * images,
        num_classes=2,
        use_box_type=True,
        with_mask=panoptic or _asks_for(cfg, 'with_mask'),
        with_semantic=panoptic or _asks_for(cfg, 'with_seg'),
    )
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes.tensor
        sample.gt_instances.labels = torch.arange(len(boxes)) % classes
        # As large as the anchors, so that heads see positive samples.
        boxes[:] = _spread_boxes(len(boxes), shape[1:])
        if proposals:
            sample.proposals = InstanceData(bboxes=boxes.clone())
        if 'gt_sem_seg' in sample:
            stripes = torch.arange(shape[2]).expand(1, *shape[1:]) % classes
            sample.gt_sem_seg.sem_seg = stripes.to(torch.uint8)
    return batch


def _asks_for(cfg: Config, annotation: str) -> bool:
    """Return whether the config loads this kind of annotation."""
    return any(node.get(annotation) is True for node in dicts_in(cfg))


def _spread_boxes(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Return boxes from a quarter to the whole of the image, (count, 4) as corners."""
    height, width = size
    share = torch.linspace(0.25, 1.0, count)
    zeros = torch.zeros(count)
    return torch.stack([zeros, zeros, share * width, share * height], 1)
