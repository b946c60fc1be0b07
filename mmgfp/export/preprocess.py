"""From an image to the input of an exported model, on the host or inside the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmgfp.utils.errors import ConfigError

#: Resizing that can be repeated: keeping the ratio inside the input, or filling it.
RESIZES = ('Resize', 'FixScaleResize')


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model.

    Attributes:
        mean: Is subtracted from each channel; zeros if nothing is.
        std: Divides each channel.
        bgr_to_rgb: Whether the two colour orders are swapped before.
        channel_order: Order of the colours of an image as it is loaded.
        input_size: (H, W) of the input.
        keep_ratio: Whether an image is resized to fit and padded on the right and the
            bottom, rather than stretched.
        pad_size_divisor: Sides of the input are multiples of it.
        pad_value: What the padding holds after normalisation, one value per channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr_to_rgb: bool
    channel_order: str
    input_size: tuple[int, int]
    keep_ratio: bool
    pad_size_divisor: int
    pad_value: tuple[float, ...]

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (H, W) that an image is resized to, without padding.

        Examples:
            >>> Preprocessing(
            ...     (0.0,), (1.0,), False, 'bgr', (100, 200), True, 1, (0.0,)
            ... ).scaled_size(50, 50)
            (100, 100)
        """
        if not self.keep_ratio:
            return self.input_size
        ratio = min(self.input_size[0] / height, self.input_size[1] / width)
        return int(height * ratio + 0.5), int(width * ratio + 0.5)

    def plain_pad_value(self) -> float | list[float]:
        """Return one number if all channels are padded with it, else one of each."""
        values = sorted(set(self.pad_value))
        return values[0] if len(values) == 1 else list(self.pad_value)


def preprocessing_of(
    cfg: Config, model: Any, shape: Sequence[int], pipeline: Sequence[Mapping]
) -> Preprocessing:
    """Read how a config's images are prepared for testing.

    Args:
        cfg: The config.
        model: The model that was built from it.
        shape: (C, H, W) of the input.
        pipeline: The transforms of testing.

    Raises:
        ConfigError: If the input size does not suit the model's padding.
    """
    processor: Any = model.data_preprocessor
    channels, height, width = shape
    divisor = int(getattr(processor, 'pad_size_divisor', 1) or 1)
    if height % divisor or width % divisor:
        raise ConfigError(
            '--input-shape',
            f'a size whose sides are multiples of pad_size_divisor={divisor}',
            f'{tuple(shape)}',
            'round it up',
        )
    normalizes = getattr(processor, '_enable_normalize', False)
    mean = _per_channel(processor.mean, channels) if normalizes else (0.0,) * channels
    std = _per_channel(processor.std, channels) if normalizes else (1.0,) * channels
    swaps = getattr(processor, '_channel_conversion', False)
    swaps = bool(swaps or getattr(processor, 'to_rgb', False))
    pad = (float(getattr(processor, 'pad_value', 0) or 0),) * channels
    for step in pipeline:
        if step_name(step) == 'Pad':  # before normalisation, in grey levels
            levels = _pad_levels(step, channels)
            # The colours of a padding are swapped like those of the image.
            levels = levels[::-1] if swaps else levels
            pad = tuple((p - m) / s for p, m, s in zip(levels, mean, std, strict=True))
    keeps = any(
        step_name(step) == 'FixScaleResize' or step.get('keep_ratio')
        for step in pipeline
        if step_name(step) in RESIZES
    )
    loads = next((s for s in pipeline if 'LoadImage' in step_name(s)), {})
    order = str(loads.get('channel_order') or loads.get('color_type') or 'bgr')
    order = {'color': 'bgr', 'unchanged': 'bgr'}.get(order, order)
    return Preprocessing(mean, std, swaps, order, (height, width), keeps, divisor, pad)


def step_name(step: Mapping[str, Any]) -> str:
    """Return the name of a transform without its module."""
    return str(step.get('type')).rpartition('.')[2]


def _per_channel(values: Tensor, channels: int) -> tuple[float, ...]:
    flat = [float(v) for v in values.flatten()]
    return tuple(flat * channels if len(flat) == 1 else flat)


def _pad_levels(step: Mapping[str, Any], channels: int) -> tuple[float, ...]:
    value = step.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    many = value if isinstance(value, list | tuple) else [value] * channels
    return tuple(float(v) for v in many)


def check_can_resize(pipeline: Sequence[Mapping[str, Any]]) -> None:
    """Check that resizing of a pipeline can be put into a file.

    Raises:
        ConfigError: If it crops, or resizes in a way that is not known.
    """
    for step in pipeline:
        kind = step_name(step)
        if kind in (*RESIZES, 'Pad') or kind.startswith(('Load', 'Pack')):
            bilinear = step.get('interpolation', 'bilinear') == 'bilinear'
            if bilinear and step.get('backend', 'cv2') == 'cv2':
                continue
        raise ConfigError(
            f'the step {kind} of the test pipeline',
            'bilinear resizing by cv2 to the input size',
            str(dict(step))[:120],
            'leave --preprocess out and prepare images outside of the file',
        )


class WithPreprocessing(nn.Module):
    """A graph that resizes, pads and normalises an image itself.

    The image is (1, H, W, C) of uint8. Detections come in its own pixels.

    Args:
        graph: Takes (1, C, H, W) as the data preprocessor gives it.
        prep: How the image becomes that.
    """

    mean: Tensor
    std: Tensor
    pad: Tensor

    def __init__(self, graph: nn.Module, prep: Preprocessing) -> None:
        super().__init__()
        self.graph = graph
        self.prep = prep
        self.outputs: tuple[str, ...] = graph.outputs  # type: ignore[assignment]
        for name, values in (
            ('mean', prep.mean),
            ('std', prep.std),
            ('pad', prep.pad_value),
        ):
            tensor = torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def prepare(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input (1, C, H, W) of the graph, and the image's (w, h) / its.

        Args:
            image: (1, H, W, C) of uint8.
        """
        # Sizes as tensors, so that tracing follows them.
        sides = torch._shape_as_tensor(image)[1:3].float()  # (2,): H, W
        size = sides.new_tensor(self.prep.input_size)
        scaled = size
        if self.prep.keep_ratio:
            scaled = torch.floor(sides * torch.min(size / sides) + 0.5)
        step = sides / scaled
        # Bilinear as cv2 does it, but not rounded to whole levels: runtimes round ties
        # differently. Rows and columns are picked by number, which keeps the output's
        # size fixed whatever the image's is.
        pixels = image
        inside = []
        for axis, length in enumerate(self.prep.input_size):
            cells = torch.arange(length, dtype=torch.float32)
            last = sides[axis] - 1
            place = torch.minimum(((cells + 0.5) * step[axis] - 0.5).clamp(min=0), last)
            before = torch.floor(place)
            after = torch.minimum(before + 1, last)
            share = (place - before).view([-1, 1, 1] if axis == 0 else [-1, 1])
            low = pixels.index_select(axis + 1, before.long()).float()
            high = pixels.index_select(axis + 1, after.long()).float()
            pixels = low + (high - low) * share
            inside.append(cells < scaled[axis])
        pixels = pixels.permute(0, 3, 1, 2)
        if self.prep.bgr_to_rgb:
            pixels = pixels.flip(1)
        normal = (pixels - self.mean) / self.std
        covered = inside[0].view(-1, 1) & inside[1].view(1, -1)
        return torch.where(covered, normal, self.pad), step.flip(0)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the graph's outputs, detections in pixels of the image."""
        inputs, step = self.prepare(image)
        values = self.graph(inputs)
        values = tuple(values) if isinstance(values, tuple | list) else (values,)
        if 'dets' not in self.outputs:
            return values
        factors = torch.cat([step, step, torch.ones(1)])
        return tuple(
            value * factors if name == 'dets' else value
            for name, value in zip(self.outputs, values, strict=True)
        )
