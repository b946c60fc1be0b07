"""Costs of a model as arithmetic on the sizes of its parameters.

MACs count one fused multiply-add as one. Memory is the number of elements that all
layers put out. Both are for one image (paper, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmgfp.groups import ChannelGroup


@dataclass(frozen=True)
class LayerWork:
    """What a layer does for one image.

    Attributes:
        macs_positions: How often each weight element is used: output positions of a
            convolution, input positions of a transposed one, rows of an FC layer.
        out_positions: Elements put out per output channel.
        out_dim: The weight's dimension that holds the output channels.
    """

    macs_positions: float
    out_positions: float
    out_dim: int = 0


@dataclass(frozen=True)
class Totals:
    """Costs of a whole model, or what one unit of each group adds to them.

    Attributes:
        macs: Multiply-accumulates.
        memory: Output elements of all layers.
        params: Elements of all parameters.
    """

    macs: np.ndarray | float
    memory: np.ndarray | float
    params: np.ndarray | float

    def __getitem__(self, name: str) -> np.ndarray | float:
        """The cost called ``name``; ``flops`` is the field's word for MACs."""
        return getattr(self, 'macs' if name == 'flops' else name)


class CostTable:
    """Costs for any number of units removed from each group.

    Args:
        shapes: Shapes of all parameters by name.
        work: Work of the layers by the name of their weight.
        groups: The groups G.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        work: Mapping[str, LayerWork],
        groups: Sequence[ChannelGroup],
    ) -> None:
        names = list(shapes)
        row = {name: i for i, name in enumerate(names)}
        rank = max((len(s) for s in shapes.values()), default=0)
        self.sizes = np.ones((len(names), rank))  # (T, D)
        for name, shape in shapes.items():
            self.sizes[row[name], : len(shape)] = shape
        self.removal = np.zeros((len(groups), len(names), rank))  # (G, T, D)
        for g, group in enumerate(groups):
            for member in group.members:
                if member.name in row:
                    self.removal[g, row[member.name], member.dim] += member.width
        self.positions = np.zeros(len(names))  # (T,)
        self.out_positions = np.zeros(len(names))  # (T,)
        self.out_dims = np.zeros(len(names), dtype=int)  # (T,)
        for name, layer in work.items():
            self.positions[row[name]] = layer.macs_positions
            self.out_positions[row[name]] = layer.out_positions
            self.out_dims[row[name]] = layer.out_dim

    def totals(self, removed: np.ndarray) -> Totals:
        """Costs of the model without ``removed`` units of each group, (G,)."""
        sizes = self.sizes - np.tensordot(removed, self.removal, 1)
        return self._totals(sizes)

    def savings(self, removed: np.ndarray) -> Totals:
        """What removing one more unit of each group saves, three arrays (G,)."""
        sizes = self.sizes - np.tensordot(removed, self.removal, 1)
        now, then = self._totals(sizes), self._totals(sizes - self.removal)
        return Totals(
            now.macs - then.macs, now.memory - then.memory, now.params - then.params
        )

    def _totals(self, sizes: np.ndarray) -> Totals:
        """Costs for tensors of ``sizes``, (..., T, D)."""
        elements = sizes.prod(-1)  # (..., T)
        rows = np.arange(sizes.shape[-2])
        outputs = sizes[..., rows, self.out_dims]  # (..., T)
        return Totals(
            elements @ self.positions, outputs @ self.out_positions, elements.sum(-1)
        )
