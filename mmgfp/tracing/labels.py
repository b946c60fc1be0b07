"""Labels of channel elements, and which of them can only be pruned together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

#: Marks an element that belongs to no parameter, such as a padded channel.
NO_LABEL = -1


class LabelTable:
    """Hands out labels and collects what is known about them.

    Every slice of every parameter dimension has one label. Ops on the graph
    equate labels; the table stores pairs and resolves them all at once.

    Attributes:
        vectors: Labels of each tensor dimension, (size,), by tensor name and dimension.
        size: Number of labels handed out.

    Examples:
        >>> table = LabelTable()
        >>> out = table.vector('conv1.weight', 0, 3)
        >>> table.equate(out, table.vector('conv2.weight', 1, 3))
        >>> table.freeze(out[:1], 'an example')
        >>> table.components().tolist()
        [0, 1, 2, 0, 1, 2]
        >>> table.frozen(table.components())
        {0: ['an example']}
    """

    def __init__(self) -> None:
        self.vectors: dict[tuple[str, int], Tensor] = {}
        self.size = 0
        self._starts: list[int] = []
        self._owners: list[tuple[str, int]] = []
        self._pairs: list[np.ndarray] = []
        self._frozen: list[tuple[np.ndarray, str]] = []
        self._notes: list[tuple[np.ndarray, str]] = []
        self._produced: list[np.ndarray] = []
        self._consumed: list[np.ndarray] = []

    def vector(self, name: str, dim: int, size: int) -> Tensor:
        """Return the labels of a dimension of the tensor called ``name``, (size,)."""
        key = (name, dim)
        if key not in self.vectors:
            self.vectors[key] = torch.arange(self.size, self.size + size)
            self._starts.append(self.size)
            self._owners.append(key)
            self.size += size
        return self.vectors[key]

    def owners(self, labels: Tensor) -> list[str]:
        """Return the names of the tensors that ``labels`` are of, in order."""
        flat = _flat(labels)
        starts = np.searchsorted(self._starts, flat[flat != NO_LABEL], 'right') - 1
        return [self._owners[i][0] for i in np.unique(starts)]

    def equate(self, a: Tensor, b: Tensor) -> None:
        """Let elements of ``a`` and ``b``, broadcast together, be pruned together only.

        Elements without a label constrain nothing.
        """
        pairs = np.stack([_flat(x) for x in torch.broadcast_tensors(a, b)])  # (2, E)
        pairs = pairs[:, (pairs != NO_LABEL).all(0) & (pairs[0] != pairs[1])]
        if pairs.size:
            # A pair as one number: np.unique is far faster on those than on columns.
            keys = np.unique(pairs[0] * self.size + pairs[1])
            self._pairs.append(np.stack([keys // self.size, keys % self.size]))

    def merge(self, plane: Tensor, dim: int) -> Tensor:
        """Equate all elements along ``dim``; return one slice of size 1 there."""
        if plane.shape[dim] == 1:
            return plane
        # A slice without a label takes the first label that stands beside it.
        labelled = (plane != NO_LABEL).to(torch.int8).argmax(dim, keepdim=True)
        first = plane.gather(dim, labelled)
        self.equate(first, plane)
        return first

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Never prune these elements, nor what is equated with them."""
        flat = np.unique(_flat(labels))
        flat = flat[flat != NO_LABEL]
        if flat.size:
            self._frozen.append((flat, reason))

    def note(self, labels: Tensor, remark: str) -> None:
        """Keep a remark for the case that pruning these elements turns out wrong."""
        flat = np.unique(_flat(labels))
        self._notes.append((flat[flat != NO_LABEL], remark))

    def notes_on(self, dimensions: Iterable[tuple[str, int]]) -> list[str]:
        """Return the remarks on elements that are equated with some of ``dimensions``.

        Args:
            dimensions: Names of tensors, and one dimension of each.
        """
        if not self._notes:
            return []
        components = self.components()
        labels = [self.vectors[d].numpy() for d in dimensions if d in self.vectors]
        on = components[np.concatenate([np.empty(0, dtype=np.int64), *labels])]
        remarks = [
            r for noted, r in self._notes if np.isin(components[noted], on).any()
        ]
        return list(dict.fromkeys(remarks))

    def produce(self, labels: Tensor) -> None:
        """Mark labels of a layer's output dimension."""
        self._produced.append(np.unique(_flat(labels)))

    def consume(self, labels: Tensor) -> None:
        """Mark labels of a layer's input dimension (where a zeroed slice is a mask)."""
        self._consumed.append(np.unique(_flat(labels)))

    def produced(self) -> np.ndarray:
        """Return whether each label lies on a layer's output dimension, (size,)."""
        return self._marked(self._produced)

    def consumed(self) -> np.ndarray:
        """Return whether each label lies on a layer's input dimension, (size,)."""
        return self._marked(self._consumed)

    def components(self) -> np.ndarray:
        """Return the number of each label's connected set, (size,)."""
        pairs = np.concatenate([np.empty((2, 0), dtype=np.int64), *self._pairs], 1)
        ones = np.ones(pairs.shape[1], dtype=np.int8)
        graph = coo_matrix((ones, (pairs[0], pairs[1])), shape=(self.size, self.size))
        return connected_components(graph, directed=False)[1]

    def frozen(self, components: np.ndarray) -> dict[int, list[str]]:
        """Return why components stay, for those that hold a frozen label."""
        reasons: dict[int, list[str]] = defaultdict(list)
        for labels, reason in self._frozen:
            for component in np.unique(components[labels]).tolist():
                if reason not in reasons[component]:
                    reasons[component].append(reason)
        return dict(reasons)

    def _marked(self, parts: list[np.ndarray]) -> np.ndarray:
        mask = np.zeros(self.size, dtype=bool)
        for labels in parts:
            mask[labels] = True
        return mask


def _flat(labels: Tensor) -> np.ndarray:
    return labels.reshape(-1).numpy()


def varying(plane: Tensor) -> frozenset[int]:
    """Return the dimensions along which ``plane`` has more than one label."""
    return frozenset(d for d, size in enumerate(plane.shape) if size > 1)


def relax(plane: Tensor) -> Tensor:
    """Cut to size 1 the dimensions along which all labels turn out to be equal."""
    for d in sorted(varying(plane)):
        first = plane.narrow(d, 0, 1)
        if torch.equal(first.expand_as(plane), plane):
            plane = first
    return plane
