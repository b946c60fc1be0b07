"""Masks as zeroed input columns: what a pruned unit feeds into is read as zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.groups import ChannelGroup, Member

#: A dimension of a parameter, by its name.
Columns = tuple[str, int]


class ColumnMask:
    """Keeps the input columns of pruned units at zero, weights and gradients alike.

    Zero columns of every layer that reads a unit are exactly a mask on its inputs
    (paper, section 3.1) and add nothing to the forward pass.

    Args:
        model: The model to mask, in place.
        groups: Its groups.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.groups = groups
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        # Groups and what they are to the columns that their units are read from.
        self._readers: dict[Columns, list[tuple[int, Member]]] = {}
        for g, group in enumerate(groups):
            for member in group.members:
                if member.role == 'in':
                    readers = self._readers.setdefault((member.name, member.dim), [])
                    readers.append((g, member))
        self._ends = np.cumsum([g.units for g in groups], dtype=int)[:-1]
        self._alive = self._split(np.ones(sum(g.units for g in groups), dtype=bool))
        self._index: dict[Columns, Tensor] = {}
        self._handles: dict[Columns, Any] = {}

    def update(self, alive: np.ndarray) -> None:
        """Mask all units that are not ``alive``, (U,).

        Only what reads units that went or came back is touched.
        """
        before, self._alive = self._alive, self._split(alive.copy())
        changed = [
            not np.array_equal(old, new)
            for old, new in zip(before, self._alive, strict=True)
        ]
        for columns, readers in self._readers.items():
            if any(changed[g] for g, _ in readers):
                gone = [m.index[~self._alive[g]] for g, m in readers]
                fresh = [m.index[before[g] & ~self._alive[g]] for g, m in readers]
                self._set(columns, np.concatenate([*map(np.ravel, gone)]))
                self._zero(columns, np.concatenate([*map(np.ravel, fresh)]))

    def _split(self, alive: np.ndarray) -> list[np.ndarray]:
        """``alive`` by group."""
        return np.split(alive, self._ends)

    def _set(self, columns: Columns, gone: np.ndarray) -> None:
        """Keep the entries ``gone`` of these columns at zero, and no others."""
        name, dim = columns
        parameter = self._parameters[name]
        self._index[columns] = torch.from_numpy(gone).to(parameter.device)
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
        self._alive = [np.ones_like(alive) for alive in self._alive]
