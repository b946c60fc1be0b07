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
class LayerProfile:
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
        profiles: Work of the layers by the name of their weight.
        groups: The groups G.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        profiles: Mapping[str, LayerProfile],
        groups: Sequence[ChannelGroup],
    ) -> None:
        names = list(shapes)
        row = {name: i for i, name in enumerate(names)}
        rank = max((len(s) for s in shapes.values()), default=0)
        self.sizes = np.ones((len(names), rank))  # (T, D)
        for name, shape in shapes.items():
            self.sizes[row[name], : len(shape)] = shape
        self.positions = np.zeros(len(names))  # (T,)
        self.out_positions = np.zeros(len(names))  # (T,)
        self.out_dims = np.zeros(len(names), dtype=int)  # (T,)
        for name, layer in profiles.items():
            self.positions[row[name]] = layer.macs_positions
            self.out_positions[row[name]] = layer.out_positions
            self.out_dims[row[name]] = layer.out_dim
        # What one unit takes off each tensor, for the pairs P of a group and a tensor.
        removal: dict[tuple[int, int], np.ndarray] = {}
        for g, group in enumerate(groups):
            for member in group.members:
                if member.name in row:
                    pair = removal.setdefault((g, row[member.name]), np.zeros(rank))
                    pair[member.dim] += member.width
        self.groups = len(groups)
        self.group_of = np.array([g for g, _ in removal], dtype=int)  # (P,)
        self.tensor_of = np.array([t for _, t in removal], dtype=int)  # (P,)
        self.removal = np.array([*removal.values()]).reshape(-1, rank)  # (P, D)

        # Which pairs change when a group shrinks: those of its tensors.
        self.pairs_of = [np.flatnonzero(self.group_of == g) for g in range(self.groups)]
        self.touched_by = [
            np.flatnonzero(np.isin(self.tensor_of, self.tensor_of[pairs]))
            for pairs in self.pairs_of
        ]

    def totals(self, removed: np.ndarray) -> Totals:
        """Costs of the model without ``removed`` units of each group, (G,)."""
        return Totals(*self.costs(self.sizes_without(removed), slice(None)).sum(1))

    def savings(self, removed: np.ndarray, more: np.ndarray | None = None) -> Totals:
        """What removing more of each group by itself saves, three arrays (G,).

        Args:
            removed: Units gone from each group, (G,).
            more: Units that go next, (G,); one of each by default.
        """
        return RunningCosts(self, removed, more).savings

    def sizes_without(self, removed: np.ndarray) -> np.ndarray:
        """Sizes of all tensors without the ``removed`` units, (T, D)."""
        sizes = self.sizes.copy()
        gone = np.asarray(removed)[self.group_of, None] * self.removal
        np.subtract.at(sizes, self.tensor_of, gone)
        return sizes

    def costs(self, sizes: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """MACs, memory and parameters of the tensors ``rows`` of ``sizes``, (3, R)."""
        elements = sizes.prod(1)  # (R,)
        outputs = sizes[np.arange(len(sizes)), self.out_dims[rows]]  # (R,)
        return np.stack(
            [
                elements * self.positions[rows],
                outputs * self.out_positions[rows],
                elements,
            ]
        )


class RunningCosts:
    """Costs that follow a model as it shrinks, worked out anew where it did only.

    Args:
        table: The model's costs.
        removed: Units gone from each group, (G,).
        more: Units that go next from each group, for its savings, (G,); one of each
            by default.
    """

    def __init__(
        self, table: CostTable, removed: np.ndarray, more: np.ndarray | None = None
    ) -> None:
        self.table = table
        self._more = np.ones(table.groups) if more is None else more.astype(float)
        self._sizes = table.sizes_without(removed)  # (T, D)
        self._costs = table.costs(self._sizes, slice(None))  # (3, T)
        self._saved = self._savings_of(slice(None))  # (3, P)

    @property
    def totals(self) -> Totals:
        """Costs of what is left."""
        return Totals(*self._costs.sum(1))

    @property
    def savings(self) -> Totals:
        """What the next units of each group save, three arrays (G,)."""
        of, count = self.table.group_of, self.table.groups
        return Totals(*(np.bincount(of, saved, count) for saved in self._saved))

    def remove(self, group: int, units: int, more: int = 1) -> None:
        """Take ``units`` off a group; then ``more`` would go next."""
        table, pairs = self.table, self.table.pairs_of[group]
        tensors = table.tensor_of[pairs]
        self._sizes[tensors] -= units * table.removal[pairs]
        self._costs[:, tensors] = table.costs(self._sizes[tensors], tensors)
        self._more[group] = more
        touched = table.touched_by[group]
        self._saved[:, touched] = self._savings_of(touched)

    def _savings_of(self, pairs: np.ndarray | slice) -> np.ndarray:
        """What the next units of a pair's group take off its tensor, (3, R)."""
        table = self.table
        tensors = table.tensor_of[pairs]
        gone = self._more[table.group_of[pairs], None] * table.removal[pairs]
        rest = table.costs(self._sizes[tensors] - gone, tensors)
        return self._costs[:, tensors] - rest
