"""The image size at which the costs of a model are counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.engine.config_search import testing_pipeline, values_in
from mmgfp.engine.demo_batch import image_channels
from mmgfp.engine.deploy import (
    Deployable,
    Trained,
    recorded_shape,
    structure_shape,
)

Shape = tuple[int, int, int]

#: Sizes (H, W) at which papers state costs, by library.
DEFAULT_SIZES = {'mmdet': (800, 1280), 'mmpretrain': (224, 224)}
#: The scale of COCO's configs, which papers count at the default size of MMDetection.
COCO_SCALE = (1333, 800)
#: Transforms that crop an image.
CROPS = ('CenterCrop', 'EfficientNetCenterCrop')


def default_input_shape(cfg: Config, channels: int | None = None) -> Shape:
    """Return the input size (C, H, W) at which papers state a model's costs.

    Args:
        cfg: A config of MMDetection or MMPretrain.
        channels: Channels of an image; those that the config tells by default.

    Examples:
        >>> default_input_shape(Config(dict(default_scope='mmdet')))
        (3, 800, 1280)
    """
    size = DEFAULT_SIZES.get(cfg.get('default_scope'), DEFAULT_SIZES['mmpretrain'])
    return (channels or image_channels(cfg), *size)


def deployed_shape(
    given: Sequence[int] | None, item: Deployable | Trained, cfg: Config
) -> tuple[Sequence[int], str]:
    """Choose the image size (C, H, W) for the costs of a pruned model.

    Args:
        given: The size that the user gives, if any; it counts before all others.
        item: The model with its checkpoint's ``meta``.
        cfg: Its config, which may name the file of the structure.

    Returns:
        The size, and where it was taken from.

    Raises:
        ConfigError: If a file names a size that is not valid.
    """
    if given is not None:
        return given, 'as --input-shape says'
    if recorded := recorded_shape(item.meta):
        return recorded, 'as the checkpoint says'
    structure = cfg.model.get('structure')
    if structure and (recorded := structure_shape(structure)):
        return recorded, f'as {structure} says'
    return _shape_of(cfg, image_channels(cfg, item.original))


def profiled_shape(
    given: Sequence[int] | None,
    hook: Sequence[int] | None,
    cfg: Config,
    channels: int,
) -> tuple[Sequence[int], str]:
    """Choose the image size (C, H, W) at which a model's latency is measured.

    Args:
        given: The size that the user gives, if any.
        hook: That of the config's pruning hook, if any.
        cfg: The config.
        channels: Channels of an image.

    Returns:
        The size, and where it was taken from.
    """
    if given is not None:
        return given, 'as --input-shape says'
    if hook is not None:
        where = f' in {Path(cfg.filename).name}' if cfg.filename else ''
        return hook, f'as the pruning hook{where} says'
    return _shape_of(cfg, channels)


def _shape_of(cfg: Config, channels: int) -> tuple[Shape, str]:
    """Return the size in testing, or the library's default, and which of them it is."""
    if size := size_in_testing(cfg):
        return (channels, *size), 'as images are resized for testing'
    return default_input_shape(cfg, channels), "the library's default"


def size_in_testing(cfg: Config) -> tuple[int, int] | None:
    """Return the largest size (H, W) of an image in testing, None if it is open.

    Examples:
        >>> steps = [dict(type='Resize', scale=(320, 300)), dict(type='PackDetInputs')]
        >>> loader = dict(dataset=dict(pipeline=steps))
        >>> size_in_testing(Config(dict(test_dataloader=loader)))
        (300, 320)
    """
    size = _size_after(testing_pipeline(cfg))
    if size is None:
        return None
    preprocessors = [cfg.get('data_preprocessor') or {}, cfg.get('model') or {}]
    multiple = max(values_in(preprocessors, 'pad_size_divisor', int), default=1)
    return _rounded(size, multiple)


def _size_after(pipeline: Iterable[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Follow the size (H, W) of an image through resizing, cropping and padding."""
    size: tuple[int, int] | None = None
    for step in pipeline:
        kind = str(step.get('type')).rpartition('.')[2]
        if kind == 'Resize':
            is_open = tuple(_pair(step.get('scale')) or ()) == COCO_SCALE[::-1]
            size = None if is_open else _pair(step.get('scale'))
        elif kind == 'ResizeEdge':
            size = None  # the other edge is open
        elif kind in CROPS:
            size = _pair(step.get('crop_size'))
        elif kind == 'Pad' and step.get('size'):
            size = _pair(step['size'])
        elif kind == 'Pad' and size is not None:
            size = (max(size),) * 2 if step.get('pad_to_square') else size
            size = _rounded(size, step.get('size_divisor') or 1)
    return size


def _pair(value: Any) -> tuple[int, int] | None:
    """Turn one side or (W, H), as transforms take them, into (H, W)."""
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    width, height = sides
    is_size = all(type(side) is int and side > 0 for side in sides)
    return (height, width) if is_size else None


def _rounded(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width
