"""Compaction: the tensors of a module are replaced by smaller ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.surgery.attributes import fix_all_attributes, fix_conv_groups
from mmgfp.surgery.blocks import replace_module_
from mmgfp.surgery.fit import check_fits
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.trial_runs import copy_module


@dataclass(frozen=True)
class Replacement:
    """A parameter or buffer, and the smaller one that has taken its place.

    Attributes:
        old: The tensor as it was.
        new: The smaller one.
        kept: Kept indices, ascending, by dimension, (K,) each.
    """

    old: Tensor
    new: Tensor
    kept: Mapping[int, Tensor]

    def select(self, tensor: Tensor) -> Tensor:
        """Return the kept entries of a tensor that has the shape of the old one."""
        return _select(tensor, self.kept)


def compact(model: nn.Module, structure: PruneStructure) -> nn.Module:
    """Return a copy of ``model`` that is shrunk to ``structure``.

    Raises:
        StructureError: If the structure does not belong to the model.

    Examples:
        >>> from torch import nn
        >>> from mmgfp import PruneStructure
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> structure = PruneStructure(
        ...     sizes={'0.weight': [3, 2], '0.bias': [3], '2.weight': [1, 3]},
        ...     kept={'0.weight': {0: [2]}, '0.bias': {0: [2]}, '2.weight': {1: [2]}},
        ... )
        >>> compact(net, structure)
        Sequential(
          (0): Linear(in_features=2, out_features=1, bias=True)
          (1): ReLU()
          (2): Linear(in_features=1, out_features=1, bias=True)
        )
    """
    return compact_(copy_module(model), structure)


def compact_(model: nn.Module, structure: PruneStructure) -> nn.Module:
    """Shrink ``model`` in place to ``structure``; kept weights stay as they are.

    Modules that the structure says are gone become `nn.Identity`.
    Parameters are new objects afterwards, so an optimizer must be built after this.
    Tensors that several modules share stay shared.

    Returns:
        nn.Module: The same object.

    Raises:
        StructureError: If the structure does not belong to the model.
    """
    replace_tensors_(model, structure)
    return model


def replace_tensors_(model: nn.Module, structure: PruneStructure) -> list[Replacement]:
    """Shrink ``model`` in place, as `compact_` does, and list the replaced tensors.

    Raises:
        StructureError: If the structure does not belong to the model.
    """
    check_fits(structure, model)
    for name in structure.identities:
        replace_module_(model, name, nn.Identity())
    owners = _owners(model)
    changed: list[nn.Module] = []
    replacements: dict[int, Replacement] = {}  # by identity of the new tensor
    for name, kept in structure.kept.items():
        module_name, _, attribute = name.rpartition('.')
        tensor = getattr(model.get_submodule(module_name), attribute)
        if id(tensor) in replacements:  # replaced under another of its names
            continue
        replacement = _replacement(tensor, kept)
        replacements[id(replacement.new)] = replacement
        for module, key in owners[id(tensor)]:
            if key == 'weight' and 0 in kept:
                fix_conv_groups(module, kept[0])  # counts them on the old weight
            setattr(module, key, replacement.new)
            changed.append(module)
    fix_all_attributes(model, changed)
    for name, width in structure.attributes.items():
        module_name, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(module_name), attribute, width)
    return [*replacements.values()]


def _replacement(old: Tensor, kept: Mapping[int, Sequence[int]]) -> Replacement:
    indices = {  # through NumPy, since torch takes longer to convert a list
        dim: torch.from_numpy(np.array(index)).to(old.device)
        for dim, index in kept.items()
    }
    new = _select(old.detach(), indices)
    channels_last = torch.channels_last
    if not old.is_contiguous() and old.is_contiguous(memory_format=channels_last):
        new = new.contiguous(memory_format=channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    return Replacement(old, new, indices)


def _select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index)
    return tensor


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the places of each tensor, by its identity: modules and attributes."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, key))
    return owners
