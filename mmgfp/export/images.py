"""Images on which an exported file is compared with the model it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor

from mmgfp.engine.config_search import testing_pipeline
from mmgfp.export.fitting import pad_to
from mmgfp.export.options import ExportOptions
from mmgfp.export.preprocess import RESIZES, Preprocessing, step_name
from mmgfp.utils.errors import ConfigError

#: Files that are taken from a folder.
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
#: Images of the test dataset that are compared by default.
DEFAULT_COUNT = 4


@dataclass(frozen=True)
class Sample:
    """An image, and the same as the model's data preprocessor gives it.

    Attributes:
        name: Where it came from.
        image: As it was loaded, (H, W, C) of uint8.
        inputs: As the model reads it, (1, C, H, W).
        data_samples: What the pipeline says about it, as a list of one.
    """

    name: str
    image: np.ndarray
    inputs: Tensor
    data_samples: list[Any]


def find_images(
    cfg: Config, paths: Sequence[Path], prep: Preprocessing
) -> tuple[list[dict[str, Any]], str]:
    """Choose images to compare on.

    Args:
        cfg: The config.
        paths: Files and folders that the user gives; none for the default.
        prep: Tells size and channels of a made-up image.

    Returns:
        What datasets say about an image, for each, and where they came from.

    Raises:
        ConfigError: If a path is missing, or a folder holds no image.
    """
    if paths:
        files = [file for path in paths for file in _files_in(path)]
        infos = [{'img_path': str(f), 'img_id': i} for i, f in enumerate(files)]
        return infos, 'given by --images'
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    if loader:
        try:
            dataset = DATASETS.build(loader.dataset)
            count = min(DEFAULT_COUNT, len(dataset))
            infos = [dataset.get_data_info(i) for i in range(count)]
        except Exception as error:  # libraries raise many kinds where files are missing
            reason = f'{type(error).__name__}: {str(error).strip()[:200]}'
        else:
            missing = [i['img_path'] for i in infos if not _is_there(i)]
            if infos and not missing:
                return infos, 'of the test dataset'
            reason = f'no file {missing[0]}' if missing else 'it is empty'
    else:
        reason = 'the config has none'
    return [_made_up(prep)], f'made up, as the test dataset cannot be read ({reason})'


def _is_there(info: Mapping[str, Any]) -> bool:
    path = info.get('img_path', '')
    return 'img' in info or '://' in path or Path(path).is_file()


def _files_in(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError('--images', 'files or folders', str(path), 'check the path')
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(
            f'--images {path}',
            f'a folder with images ({", ".join(SUFFIXES)})',
            'none',
            'name another one',
        )
    return files


def _made_up(prep: Preprocessing) -> dict[str, Any]:
    """Return an image of bright rectangles on a slope of grey."""
    rng = np.random.default_rng(0)
    height, width = prep.input_size
    channels = len(prep.mean)
    slope = np.linspace(40, 120, width).reshape(1, -1, 1)
    image = np.broadcast_to(slope, (height, width, channels)).astype(np.uint8).copy()
    for _ in range(12):
        y, x = rng.integers(0, height * 3 // 4), rng.integers(0, width * 3 // 4)
        tall = rng.integers(height // 8 + 1, height // 2 + 2)
        wide = rng.integers(width // 8 + 1, width // 2 + 2)
        image[y : y + tall, x : x + wide] = rng.integers(0, 256, channels)
    return {'img': image[..., 0] if channels == 1 else image, 'img_id': 0}


def read_samples(
    cfg: Config,
    model: Any,
    infos: Sequence[Mapping[str, Any]],
    prep: Preprocessing,
    options: ExportOptions,
) -> Iterator[Sample]:
    """Send images through the config's test pipeline and the data preprocessor.

    Images are resized to fit the input and padded to its size; where the size is free,
    as the config does it. The model is told that the padding is part of the image, as a
    file that takes the input alone cannot know where the padding begins.

    Raises:
        ConfigError: If the pipeline gives another size than the input's.
    """
    pipeline = [
        step
        for step in testing_pipeline(cfg)
        if not step_name(step).startswith('Load') or 'Image' in step_name(step)
    ]
    loads = [step for step in pipeline if step_name(step).startswith('Load')]
    rest = [step for step in pipeline if step not in loads]
    if not rest:
        packs = 'PackInputs' if cfg.get('default_scope') == 'mmpretrain' else None
        rest = [{'type': packs or 'PackDetInputs'}]
        loads = [{'type': 'LoadImageFromFile'}]
    for info in infos:
        results = dict(info)
        if 'img' not in results:
            results = Compose(loads)(results)
        image = results['img']
        results.setdefault('img_path', 'in memory')
        results.setdefault('img_shape', image.shape[:2])
        results.setdefault('ori_shape', image.shape[:2])
        name = str(results['img_path'])
        kept = np.array(image if image.ndim == 3 else image[..., None])
        data = Compose(_fitted(rest, prep, image.shape[:2], options))(results)
        batch = model.data_preprocessor(pseudo_collate([data]), False)
        inputs = batch['inputs']
        if 'size' not in options.dynamic:
            inputs = _padded(inputs, prep, name)
        whole = tuple(inputs.shape[-2:])
        for sample in batch['data_samples']:
            # The padding is part of the image, and results are in its pixels.
            keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
            sample.set_metainfo(dict.fromkeys(keys, whole))
            sample.set_metainfo({'scale_factor': (1.0, 1.0)})
        yield Sample(name, kept, inputs, batch['data_samples'])


def _fitted(
    steps: Sequence[Mapping[str, Any]],
    prep: Preprocessing,
    size: tuple[int, int],
    options: ExportOptions,
) -> list[dict[str, Any]]:
    """Let the pipeline resize to what fits the input of the file."""
    fitted = [dict(step) for step in steps]
    if 'size' in options.dynamic:
        return fitted
    height, width = prep.scaled_size(*size)
    for step in fitted:
        if step_name(step) in RESIZES:
            step.update(type='Resize', scale=(width, height))
            if prep.keep_ratio:
                step['keep_ratio'] = False  # as the size keeps it
    return fitted


def _padded(inputs: Tensor, prep: Preprocessing, name: str) -> Tensor:
    """Pad (N, C, h, w) on the right and the bottom to the input's size."""
    height, width = inputs.shape[-2:]
    down, right = prep.input_size[0] - height, prep.input_size[1] - width
    if down < 0 or right < 0 or ((down or right) and not prep.keep_ratio):
        raise ConfigError(
            '--input-shape',
            f'the size that the test pipeline gives ({name}: '
            f'{tuple(inputs.shape[-2:])})',
            f'{prep.input_size}',
            'name that size, or change the pipeline by --cfg-options',
        )
    return pad_to(inputs, prep.input_size, prep.pad_value)
