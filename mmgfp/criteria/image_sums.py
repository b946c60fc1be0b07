"""Sums by layer and image, over the forward passes that a step is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class ImageSums:
    """Sums over the calls of each layer, (N, C), apart for each forward pass."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}

    def add(self, number: int, layer: str, values: Tensor) -> str | None:
        """Add what one call of a layer gives.

        Args:
            number: The forward pass that the call belongs to.
            layer: Name of the layer.
            values: By image, (N, C).

        Returns:
            Why they are not added: layers of one pass see the same images.
        """
        sums = self._sums.setdefault(number, {})
        others = next(iter(sums.values()), values)
        if len(values) != len(others):
            return f'{len(values)} images where others saw {len(others)}'
        if layer in sums:
            sums[layer] += values
        else:
            sums[layer] = values
        return None

    def clear(self) -> None:
        """Start anew."""
        self._sums = {}

    @property
    def joined(self) -> dict[str, Tensor]:
        """The sums by layer since the start, (N, C), for the images of all passes."""
        return _joined([sums for sums in self._sums.values() if sums])


def _joined(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return sums by layer, (N, C), for the images of several forward passes."""
    if len(sums) == 1:
        return dict(sums[0])
    counts = [len(next(iter(s.values()))) for s in sums]
    joined: dict[str, Tensor] = {}
    for layer in dict.fromkeys(layer for s in sums for layer in s):
        example = next(s[layer] for s in sums if layer in s)
        none = example.new_zeros(1)
        parts = [
            s.get(layer, none.expand(n, *example.shape[1:]))
            for s, n in zip(sums, counts, strict=True)
        ]
        joined[layer] = torch.cat(parts)
    return joined
