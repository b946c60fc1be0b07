"""Masks as zeroed input columns: layers that read a pruned unit read it as zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.groups import ChannelGroup, Member

#: A dimension of a parameter, by the parameter's name.
Columns = tuple[str, int]


class ColumnMask:
    """Keep the input columns of pruned units at zero, in weights and in gradients.

    Zero columns in every layer that reads a unit are exactly a mask on its inputs
    (paper, section 3.1) and add nothing to the forward pass.

    Args:
        model: The model to mask, in place.
        groups: Its groups.

    Examples:
        >>> import numpy as np
        >>> from torch import nn
        >>> from mmgfp.groups import ChannelGroup, Member
        >>> reader = Member('weight', 1, np.array([[0], [1], [2]]), 'in')
        >>> layer = nn.Linear(3, 1)
        >>> mask = ColumnMask(layer, [ChannelGroup('inputs', (reader,))])
        >>> mask.update(np.array([True, False, True]))
        >>> (layer.weight == 0).tolist()
        [[False, True, False]]
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.groups = groups
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        # Which groups read which columns, looked up from either side.
        self._readers: dict[Columns, list[tuple[int, Member]]] = {}
        self._read: list[list[Columns]] = [[] for _ in groups]  # by group
        for g, group in enumerate(groups):
            for member in group.members:
                if member.is_input:
                    columns = member.name, member.dim
                    self._readers.setdefault(columns, []).append((g, member))
                    self._read[g].append(columns)
        self._ends = np.cumsum([0, *(g.units for g in groups)])
        self._kept = np.ones(self._ends[-1], dtype=bool)
        self._index: dict[Columns, Tensor] = {}
        self._handles: dict[Columns, Any] = {}

    def update(self, kept: np.ndarray) -> None:
        """Mask all units that are not ``kept``, (U,).

        Only the columns of units whose state has changed are touched. Those of units
        that are kept again stay at zero until they are trained.
        """
        newly_pruned = self._kept & ~kept
        changed = np.flatnonzero(self._kept != kept)
        self._kept = kept.copy()
        groups = np.unique(np.searchsorted(self._ends, changed, side='right') - 1)
        for columns in dict.fromkeys(c for g in groups for c in self._read[g]):
            self._hold(columns, self._entries(columns, ~kept))
            self._zero(columns, self._entries(columns, newly_pruned))

    def _entries(self, columns: Columns, units: np.ndarray) -> np.ndarray:
        """Return the entries of these columns that read some of ``units``, (U,)."""
        return np.concatenate(
            [
                member.index[units[self._ends[g] : self._ends[g + 1]]].reshape(-1)
                for g, member in self._readers[columns]
            ]
        )

    def _hold(self, columns: Columns, entries: np.ndarray) -> None:
        """Keep these entries of the columns at zero from now on, and no others."""
        name, dim = columns
        parameter = self._parameters[name]
        self._index[columns] = torch.from_numpy(entries).to(parameter.device)
        if parameter.requires_grad and columns not in self._handles:

            def hook(parameter: Tensor) -> None:
                # In place, as a copy of the gradient could be the step's peak memory.
                if parameter.grad is not None:
                    parameter.grad.index_fill_(dim, self._index[columns], 0)

            handle = parameter.register_post_accumulate_grad_hook(hook)
            self._handles[columns] = handle

    @torch.no_grad()
    def _zero(self, columns: Columns, entries: np.ndarray) -> None:
        name, dim = columns
        parameter = self._parameters[name]
        index = torch.from_numpy(entries).to(parameter.device)
        parameter.index_fill_(dim, index, 0)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the columns again, as after a step of an optimizer with momentum."""
        for (name, dim), index in self._index.items():
            self._parameters[name].index_fill_(dim, index, 0)

    def remove(self) -> None:
        """Take the gradient hooks off; the columns stay at zero until trained."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._index.clear()
        self._kept[:] = True
