"""Images resized and padded to the size that a file fixes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from torch import Tensor

from mmgfp.engine.config_search import dicts_in
from mmgfp.export.preprocess import RESIZES
from mmgfp.utils.errors import ConfigError


@TRANSFORMS.register_module()
class FitInside(BaseTransform):
    """Resize as a config says, or as far as an image fits into a size.

    Args:
        size: (H, W), inside of which the image has to be.
        resize: The transform of the config that resizes.
    """

    def __init__(self, size: Sequence[int], resize: Mapping[str, Any]) -> None:
        self.size = tuple(size)
        self.resize = {k: v for k, v in resize.items() if k not in ('scale', 'type')}
        self.scale = resize['scale']

    def transform(self, results: dict) -> dict:
        """Resize the image, and boxes and masks if there are any."""
        height, width = results['img'].shape[:2]
        shape = fitted_shape((height, width), self.scale, self.size)
        resize = {**self.resize, 'scale': shape[::-1], 'keep_ratio': False}
        return TRANSFORMS.build({'type': 'Resize', **resize})(results)


def fitted_shape(
    shape: tuple[int, int], scale: Sequence[int], size: Sequence[int]
) -> tuple[int, int]:
    """Return the size (H, W) of an image that keeps its ratio inside of another.

    Args:
        shape: (H, W) of the image.
        scale: (W, H) as a config's ``Resize`` takes it, in either orientation; it
            counts if the result is not larger than ``size``.
        size: (H, W) to stay inside of.

    Examples:
        >>> fitted_shape((480, 640), (1333, 800), (800, 1344))
        (800, 1067)
        >>> fitted_shape((640, 480), (1333, 800), (800, 1344))
        (800, 600)
    """
    height, width = shape
    wide, tall = mmcv.rescale_size((width, height), tuple(scale))
    if tall > size[0] or wide > size[1]:
        ratio = min(size[0] / height, size[1] / width)
        tall, wide = int(height * ratio + 0.5), int(width * ratio + 0.5)
    return tall, wide


def fitted_pipeline(
    pipeline: Sequence[Mapping[str, Any]], size: Sequence[int]
) -> list[dict[str, Any]]:
    """Return transforms that give images of at most a size.

    Args:
        pipeline: The transforms of a config.
        size: (H, W). Images that keep their ratio fit inside, others fill it.
    """
    fitted = []
    for given in pipeline:
        step = dict(copy.deepcopy(given))
        if step.get('type') in RESIZES and step.get('scale') is not None:
            keeps = step.get('keep_ratio') or step['type'] == 'FixScaleResize'
            if keeps:
                step = {'type': 'FitInside', 'size': tuple(size), 'resize': step}
            else:
                step['scale'] = tuple(size)[::-1]
        fitted.append(step)
    return fitted


def fit_dataset(dataset: Any, size: Sequence[int]) -> None:
    """Let all pipelines of a dataset's config give images of at most a size."""
    for node in dicts_in(dataset):
        if isinstance(node, Config | dict) and node.get('pipeline'):
            node['pipeline'] = fitted_pipeline(node['pipeline'], size)


def pad_to(
    images: Tensor, size: Sequence[int | None], value: float | Sequence[float] = 0.0
) -> Tensor:
    """Pad images (N, C, h, w) on the right and the bottom.

    Args:
        images: As a data preprocessor gives them.
        size: (H, W); None where a side may have any length.
        value: What the padding holds, one number or one of each channel.

    Raises:
        ConfigError: If an image is larger than that.
    """
    height, width = images.shape[-2:]
    down, right = (size[0] or height) - height, (size[1] or width) - width
    if down < 0 or right < 0:
        raise ConfigError(
            'images of the test pipeline',
            f'at most {tuple(size)}, the size of the file',
            str((height, width)),
            'export the file for a larger image, or with --dynamic size',
        )
    inside = F.pad(torch.zeros_like(images[:, :1]), (0, right, 0, down), value=1.0)
    values = images.new_tensor(value).reshape(1, -1, 1, 1)
    return F.pad(images, (0, right, 0, down)) + inside * values
