"""Masks as zeroed input columns: layers that read a pruned unit read it as zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.groups import ChannelGroup, Member
from mmgfp.surgery.aside import Columns, ColumnsAside
from mmgfp.utils.errors import ConfigError


class ColumnMask:
    """Keep the input columns of pruned units at zero, in weights and in gradients.

    Zero columns in every layer that reads a unit are exactly a mask on its inputs
    (paper, section 3.1) and add nothing to the forward pass.

    Args:
        model: The model to mask, in place.
        groups: Its groups.
        recover: Whether columns are kept aside, for units that come back.

    Attributes:
        aside: The columns kept aside; None without ``recover``.

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

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        recover: bool = False,
    ) -> None:
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
        self.aside = ColumnsAside(self._parameters, self._index) if recover else None
        self._handles: dict[Columns, Any] = {}
        self._load_handles = self._watch_loading(model)

    def _watch_loading(self, model: nn.Module) -> list[Any]:
        """Mask weights again as soon as others are loaded into a module."""
        names = {id(self._parameters[name]): name for name, _ in self._readers}
        handles = []
        for module in model.modules():
            masked = {
                attribute: names[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if id(parameter) in names
            }
            if masked:
                hook = _LoadHook(self, masked)
                handles.append(module.register_load_state_dict_post_hook(hook))
        return handles

    def update(self, kept: np.ndarray) -> None:
        """Mask all units that are not ``kept``, (U,).

        Only the columns of units whose state has changed are touched. Those of units
        that are kept again stay at zero until they are trained, unless they were kept
        aside.
        """
        newly_pruned, back = self._kept & ~kept, ~self._kept & kept
        if self.aside is not None:
            self.apply()  # the optimizer may have moved what is masked
        changed = np.flatnonzero(self._kept != kept)
        self._kept = kept.copy()
        groups = np.unique(np.searchsorted(self._ends, changed, side='right') - 1)
        for columns in dict.fromkeys(c for g in groups for c in self._read[g]):
            pruned = self._entries(columns, newly_pruned)
            if self.aside is not None:
                self.aside.take(columns, pruned)
            self._hold(columns, self._entries(columns, ~kept))
            self._zero(columns, pruned)
            if self.aside is not None:
                self.aside.give_back(columns, self._entries(columns, back))

    def _entries(self, columns: Columns, units: np.ndarray) -> Tensor:
        """Return the entries of these columns that read some of ``units``, (U,)."""
        entries = np.concatenate(
            [
                member.index[units[self._ends[g] : self._ends[g + 1]]].reshape(-1)
                for g, member in self._readers[columns]
            ]
        )
        return torch.from_numpy(entries).to(self._parameters[columns[0]].device)

    def _hold(self, columns: Columns, entries: Tensor) -> None:
        """Keep these entries of the columns at zero from now on, and no others."""
        name, dim = columns
        parameter = self._parameters[name]
        self._index[columns] = entries
        if parameter.requires_grad and columns not in self._handles:
            # Not of `self`, which has the parameter: torch never frees such a cycle.
            index = self._index

            def hook(parameter: Tensor) -> None:
                # In place, as a copy of the gradient could be the step's peak memory.
                if parameter.grad is not None:
                    parameter.grad.index_fill_(dim, index[columns], 0)

            handle = parameter.register_post_accumulate_grad_hook(hook)
            self._handles[columns] = handle

    @torch.no_grad()
    def _zero(self, columns: Columns, entries: Tensor) -> None:
        name, dim = columns
        self._parameters[name].index_fill_(dim, entries, 0)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the columns again, as after a step of an optimizer with momentum."""
        for (name, dim), index in self._index.items():
            self._parameters[name].index_fill_(dim, index, 0)

    @torch.no_grad()
    def after_loading(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Zero the columns of a module into which weights were loaded.

        Args:
            module: The module.
            names: Names of its masked parameters, by their attributes.

        Raises:
            ConfigError: If its parameters are others now.
        """
        for attribute, name in names.items():
            if module._parameters[attribute] is not self._parameters[name]:
                raise ConfigError(
                    'load_state_dict',
                    'called so that parameters stay the same objects while pruning',
                    f'another one for {name}',
                    'load without assign=True',
                )
        for (name, dim), index in self._index.items():
            if name in names.values():
                self._parameters[name].index_fill_(dim, index, 0)

    def remove(self) -> None:
        """Take the hooks off; the columns stay at zero until trained or loaded."""
        for handle in (*self._handles.values(), *self._load_handles):
            handle.remove()
        self._handles.clear()
        self._load_handles.clear()
        self._index.clear()
        self._kept[:] = True


class _LoadHook:
    """A module's hook after `load_state_dict`; copies of the module get none.

    Args:
        mask: The mask to restore; None in a copy of the module.
        names: Names of the module's masked parameters, by their attributes.
    """

    def __init__(self, mask: ColumnMask | None, names: Mapping[str, str]) -> None:
        self.mask = mask
        self.names = names

    def __call__(self, module: nn.Module, keys: Any) -> None:
        if self.mask is not None:
            self.mask.after_loading(module, self.names)

    def __reduce__(self) -> Any:
        return _LoadHook, (None, {})


def check_not_masked(model: nn.Module) -> None:
    """Refuse a model that is being pruned.

    Raises:
        ConfigError: If a mask watches it.
    """
    for module in model.modules():
        for hook in module._load_state_dict_post_hooks.values():
            if isinstance(hook, _LoadHook) and hook.mask is not None:
                raise ConfigError(
                    'model',
                    'pruned by one pruner or hook at a time, prepared once',
                    'one that is being pruned',
                    'close the other pruner, drop the second hook, or use a copy',
                )
