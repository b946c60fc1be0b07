"""How the rows that a model's first layer reads lie in a batch of images.

As a rule a row is an image. Frames of a video or points of a cloud may be folded into
rows, views of the same images joined, or the images run through the model in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.tracing.row_values import Rows
from mmgfp.utils.tree import tree_map, tree_tensors

#: Orders of rows: all rows of an image side by side; the images over and over again;
#: and a part of the images in each call.
ORDERS = REPEATED, CYCLED, PARTED = 'repeated', 'cycled', 'parted'


def batch_size(args: Any, kwargs: Any) -> int | None:
    """Return the length of the first tensor that a model is called with."""
    first = next(tree_tensors([*args, *kwargs.values()]), None)
    return len(first) if first is not None and first.dim() else None


def rows_in_order(order: str, count: int, images: int, start: int = 0) -> Rows | None:
    """Return the images of ``count`` rows; None if they do not come out even.

    Args:
        order: One of the orders of rows.
        count: Number of rows.
        images: Number of images in the batch.
        start: Rows of earlier calls, where each reads a part.

    Examples:
        >>> rows_in_order('repeated', 4, 2).index.tolist()
        [0, 0, 1, 1]
        >>> rows_in_order('cycled', 4, 2).index.tolist()
        [0, 1, 0, 1]
        >>> rows_in_order('parted', 1, 2, 1).index.tolist()
        [1]
    """
    every = torch.arange(images, device='cpu')
    if order == PARTED:
        part = every[start : start + count]
        return Rows(images, part) if len(part) == count else None
    if not images or count % images:
        return None
    times = count // images
    if order == REPEATED:
        return Rows(images, every.repeat_interleave(times))
    return Rows(images, every.repeat(times))


def order_of(calls: Sequence[Rows]) -> str | None:
    """Return the order of the rows that a layer's calls read; None for any other."""
    for order in ORDERS:
        start = 0
        for rows in calls:
            every = torch.arange(rows.images, device='cpu')
            index = every if rows.index is None else rows.index.cpu()
            expected = rows_in_order(order, len(index), rows.images, start)
            start += len(index)
            if expected is None or not torch.equal(expected.index, index):  # type: ignore[arg-type]
                break
        else:
            if order != PARTED or start == calls[0].images:
                return order
    return None


@dataclass(frozen=True)
class Entries:
    """Calls of a whole model, one after the other.

    Attributes:
        sizes: Number of images in each, as far as its first argument shows it.
    """

    sizes: list[int | None] = field(default_factory=list)

    def share(self, images: int) -> int:
        """Return how many of ``images`` one call has, where several share them."""
        sizes = set(self.sizes)
        if len(sizes) == 1 and None not in sizes and sum(self.sizes) == images:  # type: ignore[arg-type]
            return images // len(self.sizes)
        return images


@contextmanager
def watch_entries(model: nn.Module, follow: bool = False) -> Iterator[Entries]:
    """Collect the calls of a whole model.

    Args:
        model: The module that is about to run.
        follow: Let the tensors that it is called with require gradients, so that their
            rows can be followed through the graph.

    Yields:
        Entries: The calls, filled while the model runs.
    """
    entries = Entries()

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        entries.sizes.append(batch_size(args, kwargs))
        return tree_map(_with_history, (args, kwargs)) if follow else None

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield entries
    finally:
        handle.remove()


def _with_history(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.requires_grad:
        return leaf.detach().requires_grad_().clone()
    return leaf
