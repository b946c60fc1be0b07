"""Forward passes that a step is made of, each with images of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmgfp.tracing import RowUse
from mmgfp.tracing.batches import ORDERS, batch_size, rows_in_order
from mmgfp.tracing.row_values import Lost, Rows


class ForwardPasses:
    """Forward passes since the start, each with images of its own.

    Args:
        use: What the layers read, and which module's calls bring further images.

    Attributes:
        number: Number of the pass that runs.
        overlap: Whether a pass began before the backward of another one.
    """

    def __init__(self, use: RowUse) -> None:
        self.number = 0
        self.overlap = False
        self._every_call = bool(use.entry)
        self._orders = {n: o for o in ORDERS for n in getattr(use, o)}
        self._images: int | None = None
        self._starts: dict[str, int] = {}
        self._is_open = False  # layers were tapped, and no backward has come yet
        self._is_closed = True

    def enter(self, args: Any, kwargs: Any) -> None:
        """Take in a call of the module that brings images."""
        if self._orders:
            self._images = batch_size(args, kwargs)
        self._starts.clear()
        if self._every_call or self._is_closed:
            self.overlap |= self._is_open
            self.number += 1
            self._is_open = self._is_closed = False

    def call(self) -> int:
        """Return the number of the pass that a tapped call belongs to."""
        if not self._is_closed:
            self._is_open = True
        return self.number

    def close(self, number: int) -> None:
        """Take in that the backward of a pass has begun."""
        if number == self.number:
            self._is_open, self._is_closed = False, True

    def reader(self, name: str) -> Callable[[int], Rows | Lost]:
        """Return which rows a layer reads that reads the images, from their number."""
        order = self._orders.get(name)
        if order is None:
            return Rows

        def read(count: int) -> Rows | Lost:
            start = self._starts.get(name, 0)
            self._starts[name] = start + count
            images = self._images or 0
            rows = rows_in_order(order, count, images, start)
            return rows or Lost(f'{name} reads {count} rows for {images} images')

        return read
