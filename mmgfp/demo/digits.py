"""Detection data of the demo: real handwritten digits on synthetic canvases."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from mmgfp.utils.errors import ConfigError

SPLITS = ('train', 'val')


@dataclass(frozen=True)
class DigitsSpec:
    """Parameters of the drawn images; equal specs give equal files.

    Attributes:
        num_train: Images of the training split.
        num_val: Images of the validation split.
        size: Height and width of an image in pixels.
        min_side: Smallest height and width of a pasted digit in pixels.
        max_side: Largest height and width of a pasted digit in pixels.
        max_digits: Most digits on one image; the fewest is 1.
        seed: Seed of everything random, the split of the digits included.

    Examples:
        >>> DigitsSpec(num_train=4, size=64)  # doctest: +ELLIPSIS
        DigitsSpec(num_train=4, num_val=300, size=64, ...)
    """

    num_train: int = 1500
    num_val: int = 300
    size: int = 128
    min_side: int = 20
    max_side: int = 64
    max_digits: int = 6
    seed: int = 0


def write_digits(root: str | os.PathLike[str], spec: DigitsSpec) -> None:
    """Draw both splits in COCO format, unless they exist.

    The complete folder appears by one rename, so that any number of processes may
    request it at the same time.

    Args:
        root: The folder that will hold `images/` and `annotations/`.
        spec: Parameters of the images.

    Raises:
        ConfigError: If scikit-learn, which provides the digits, is not installed, or
            if `root` holds something other than the digits of `spec`.
    """
    target = Path(root)
    if not _is_written(target, spec):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix='.digits-') as tmp:
            draft = Path(tmp, 'digits')
            _draw_splits(draft, spec)
            _publish(draft, target, spec)


def _is_written(root: Path, spec: DigitsSpec) -> bool:
    if not root.is_dir() or not any(root.iterdir()):
        return False
    note = root / 'spec.json'
    content = json.loads(note.read_text()) if note.is_file() else 'other files'
    if content != asdict(spec):
        raise ConfigError(
            f'data_root {root} must be empty or hold the digits of {asdict(spec)} '
            f'(got {content}); delete the folder or name another one'
        )
    return True


def _publish(draft: Path, target: Path, spec: DigitsSpec) -> None:
    try:
        os.rename(draft, target)
    except OSError:  # another process was faster, or the disk is full or read-only
        if not _is_written(target, spec):
            raise


def _draw_splits(root: Path, spec: DigitsSpec) -> None:
    for index, split in enumerate(SPLITS):
        rng = np.random.default_rng((spec.seed, index))
        glyphs, classes = source_digits(split, spec.seed)
        count = spec.num_train if split == 'train' else spec.num_val
        (root / 'images' / split).mkdir(parents=True)
        coco = _empty_coco(spec)
        for image_id in range(count):
            image, boxes, labels = draw_image(rng, glyphs, classes, spec)
            name = f'{image_id:05d}.png'
            cv2.imwrite(str(root / 'images' / split / name), image)
            _add_image(coco, image_id, name, boxes, labels)
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(coco))
    (root / 'spec.json').write_text(json.dumps(asdict(spec)))


def source_digits(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the handwritten digits that belong to one split.

    Args:
        split: `train` (four fifths of the 1,797 digits) or `val` (the rest).
        seed: Seed of the split.

    Returns:
        Glyphs (N, 8, 8) with ink in [0, 1], and their classes (N,).

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    if importlib.util.find_spec('sklearn') is None:
        raise ConfigError(
            'DigitsDetection must have scikit-learn, which contains the digits '
            '(got no such module); run pip install scikit-learn'
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    cut = len(order) * 4 // 5
    chosen = order[:cut] if split == 'train' else order[cut:]
    return digits.images[chosen] / 16.0, digits.target[chosen]


def draw_image(
    rng: np.random.Generator,
    glyphs: np.ndarray,
    classes: np.ndarray,
    spec: DigitsSpec,
) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Draw one image: an uneven background, some digits, noise.

    Args:
        rng: Source of everything random.
        glyphs: Digits to choose from, (N, 8, 8) in [0, 1].
        classes: Their classes, (N,).
        spec: Sizes and counts.

    Returns:
        The image (H, W, 3) as uint8, boxes as `[x, y, w, h]` in pixels, classes.
    """
    coarse = rng.uniform(0.2, 0.8, (4, 4, 3)).astype(np.float32)
    shape = (spec.size, spec.size)
    canvas: np.ndarray = cv2.resize(coarse, shape, interpolation=cv2.INTER_CUBIC)
    taken = np.zeros(shape, dtype=bool)
    boxes, labels = [], []
    for _ in range(rng.integers(1, spec.max_digits + 1)):
        pick = rng.integers(len(glyphs))
        ink = _scaled(glyphs[pick], rng, spec)  # (h, w)
        box = _place(taken, ink.shape, rng)
        if box is not None:
            _paste(canvas, ink, box, rng)
            boxes.append(box)
            labels.append(int(classes[pick]))
    canvas += rng.normal(0.0, 0.04, canvas.shape)
    return (canvas.clip(0.0, 1.0) * 255).astype(np.uint8), boxes, labels


def _scaled(
    glyph: np.ndarray, rng: np.random.Generator, spec: DigitsSpec
) -> np.ndarray:
    """Enlarge a digit (8, 8) and crop it to its ink, (h, w)."""
    side = int(rng.integers(spec.min_side, spec.max_side + 1))
    ink = cv2.resize(
        glyph.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC
    )
    ink = ink.clip(0.0, 1.0)
    rows, cols = (np.flatnonzero((ink > 0.2).any(axis=axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def _place(
    taken: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator
) -> list[int] | None:
    """Find a free box `[x, y, w, h]` for a shape (h, w) and mark it as taken."""
    height, width = shape
    for _ in range(20):  # a crowded canvas simply gets fewer digits
        x = int(rng.integers(taken.shape[1] - width + 1))
        y = int(rng.integers(taken.shape[0] - height + 1))
        spot = taken[y : y + height, x : x + width]
        if not spot.any():
            spot[:] = True
            return [x, y, width, height]
    return None


def _paste(
    canvas: np.ndarray, ink: np.ndarray, box: list[int], rng: np.random.Generator
) -> None:
    """Blend ink (h, w) into the canvas (H, W, 3), darker or brighter than it."""
    x, y, width, height = box
    patch = canvas[y : y + height, x : x + width]
    # Away from the background's brightness, so that every digit stands out.
    step = rng.uniform(0.25, 0.6, 3) * (1 if patch.mean() < 0.5 else -1)
    patch += ink[:, :, None] * step


def _empty_coco(spec: DigitsSpec) -> dict[str, Any]:
    categories = [{'id': digit, 'name': str(digit)} for digit in range(10)]
    info = {'description': 'scikit-learn digits on canvases', **asdict(spec)}
    return {'info': info, 'categories': categories, 'images': [], 'annotations': []}


def _add_image(
    coco: dict[str, Any],
    image_id: int,
    name: str,
    boxes: list[list[int]],
    labels: list[int],
) -> None:
    size = coco['info']['size']
    coco['images'].append(
        {'id': image_id, 'file_name': name, 'width': size, 'height': size}
    )
    for box, label in zip(boxes, labels, strict=True):
        coco['annotations'].append(
            {
                'id': len(coco['annotations']) + 1,
                'image_id': image_id,
                'category_id': label,
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': 0,
            }
        )


@DATASETS.register_module()
class DigitsDetection(CocoDataset):
    """Detection of handwritten digits, drawn on first use.

    Scikit-learn's 8x8 digits are pasted on canvases at several scales and
    intensities. Training and validation images use different digits.

    Args:
        data_root: Folder of the data, created if it does not exist.
        spec: Fields of `DigitsSpec` that differ from their defaults.
        **kwargs: Arguments of mmdet's `CocoDataset`.
    """

    METAINFO = {
        'classes': tuple(str(digit) for digit in range(10)),
        'palette': [(25 * i, 255 - 25 * i, (97 * i) % 256) for i in range(10)],
    }

    def __init__(
        self, *, data_root: str, spec: dict[str, int] | None = None, **kwargs: Any
    ) -> None:
        write_digits(data_root, DigitsSpec(**(spec or {})))
        super().__init__(data_root=data_root, **kwargs)
