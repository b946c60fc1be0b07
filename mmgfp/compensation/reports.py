"""What became of the layers that removed channels reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """The outcome for a layer that the removed channels reach.

    Attributes:
        layer: Name of the layer's weight.
        before: Error of its outputs on held-out images as cut, as a share of their
            energy, both weighted; None if it was not measured.
        after: Error with the weights that it has now.
        ridge: The ridge that was chosen, of several blocks of inputs by the last one
            that was refitted; None if the weights are those of the cut.
        uniform: The share in which all positions count alike, likewise.
        reason: Why they are, else None.
    """

    layer: str
    before: float | None = None
    after: float | None = None
    ridge: float | None = None
    uniform: float | None = None
    reason: str | None = None


def refitting_text(layers: Sequence[LayerReport]) -> str:
    """Return how many layers were refitted, and how well on average, for people."""
    refitted = [layer for layer in layers if layer.reason is None]
    text = f'{len(refitted)} of {len(layers)} layers refitted'
    if refitted:
        before = np.mean([layer.before for layer in refitted])
        after = np.mean([layer.after for layer in refitted])
        text += f', held-out error {before:.4f} -> {after:.4f}'
    return text


@dataclass(frozen=True)
class Compensated:
    """A compact model, and how it was made up for what it lost.

    Attributes:
        model: The model, of the class of the original.
        layers: What became of each layer that the removed channels reach, in forward
            order.
        norms: Batch norms whose statistics were moved.
    """

    model: nn.Module
    layers: tuple[LayerReport, ...]
    norms: tuple[str, ...]

    @property
    def refitted(self) -> tuple[LayerReport, ...]:
        """The layers that have new weights."""
        return tuple(r for r in self.layers if r.reason is None)
