"""Pictures of detections, small enough to stand in a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Bytes that all pictures of a page may have together, in the page.
MOST_BYTES = 250_000
#: Longest sides that are tried, in pixels, and qualities of JPEG.
SIZES = ((480, 85), (400, 80), (320, 75), (240, 70), (160, 60))


@dataclass(frozen=True)
class Gallery:
    """Detections of several models on the same images.

    Attributes:
        models: Names of the models, the columns.
        images: Names of the images, the rows.
        pictures: One of each model for each image, as the addresses of JPEG data.
        threshold: The score from which on detections are drawn.
    """

    models: tuple[str, ...]
    images: tuple[str, ...]
    pictures: tuple[tuple[str, ...], ...]
    threshold: float


def encode(
    drawn: Sequence[Sequence[np.ndarray]], most: int = MOST_BYTES
) -> tuple[tuple[str, ...], ...] | None:
    """Encode pictures as large as a page has room for.

    Args:
        drawn: Pictures (H, W, 3) in RGB, by image and model.
        most: Bytes that they may take together.

    Returns:
        Addresses of JPEG data in the same order, or None if they are too many.
    """
    for side, quality in SIZES:
        rows = tuple(tuple(_address(p, side, quality) for p in row) for row in drawn)
        if sum(len(address) for row in rows for address in row) <= most:
            return rows
    return None


def _address(picture: np.ndarray, side: int, quality: int) -> str:
    import cv2  # only here, as many users of mmgfp have no need of it

    scale = min(1.0, side / max(picture.shape[:2]))
    size = [max(round(length * scale), 1) for length in picture.shape[1::-1]]
    small: Any = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, data = cv2.imencode('.jpg', cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)
    return f'data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}'
