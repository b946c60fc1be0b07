"""Masks as zeroed input columns: what a pruned unit feeds into is read as zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.groups import ChannelGroup


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
        self._columns: dict[tuple[str, int], Tensor] = {}
        self._handles: list[Any] = []

    def update(self, alive: np.ndarray) -> None:
        """Mask all units that are not ``alive``, (U,)."""
        self.remove()
        columns: dict[tuple[str, int], list[np.ndarray]] = {}
        start = 0
        for group in self.groups:
            gone = ~alive[start : start + group.units]
            start += group.units
            for member in group.members if gone.any() else ():
                if member.role == 'in':
                    index = member.index[gone].reshape(-1)
                    columns.setdefault((member.name, member.dim), []).append(index)
        for (name, dim), parts in columns.items():
            parameter = self._parameters[name]
            index = torch.from_numpy(np.concatenate(parts)).to(parameter.device)
            self._columns[name, dim] = index
            if parameter.requires_grad:

                def hook(grad: Tensor, dim: int = dim, index: Tensor = index) -> Tensor:
                    return grad.index_fill(dim, index, 0)

                self._handles.append(parameter.register_hook(hook))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the columns again, as after a step of an optimizer with momentum."""
        for (name, dim), index in self._columns.items():
            self._parameters[name].index_fill_(dim, index, 0)

    def remove(self) -> None:
        """Take the gradient hooks off; the columns stay at zero until trained."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._columns.clear()
