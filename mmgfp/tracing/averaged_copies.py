"""Averaged copies inside a model, such as the momentum encoder of a contrastive one.

They follow their original by an update outside of any graph, parameter by parameter,
and must keep its shapes: what goes there goes here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.tracing.labels import LabelTable


def averaged_copy_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Names of the copies of each parameter and buffer, by its own name.

    A copy is known by the interface of `torch.optim.swa_utils.AveragedModel`, which
    MMEngine's averaged models share; its original, by class and by the names and
    shapes of its tensors.
    """
    twins: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        inner = getattr(module, 'module', None)
        if not (hasattr(module, 'update_parameters') and isinstance(inner, nn.Module)):
            continue
        for part_path, part in _parts(f'{path}.module', inner):
            original = _original(model, path, part)
            if original is not None:
                for name in part.state_dict():
                    twins.setdefault(f'{original}.{name}', []).append(
                        f'{part_path}.{name}'
                    )
    return twins


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module, or where it was put together for copying, what it is made of."""
    if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        for name, child in module.named_children():
            yield from _parts(f'{path}.{name}', child)
    else:
        yield path, module


def _original(model: nn.Module, copy: str, part: nn.Module) -> str | None:
    """Name of the module that ``part``, inside of ``copy``, was copied from."""
    shapes = _shapes(part)
    found = (
        name
        for name, module in model.named_modules()
        if type(module) is type(part)
        and name != copy
        and not name.startswith(f'{copy}.')
        and _shapes(module) == shapes
    )
    return next(found, None) if shapes else None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def couple_averaged_copies(table: LabelTable, twins: dict[str, list[str]]) -> None:
    """Let copies lose what their originals lose, and be masked like them.

    What leaves a copy meets other tensors outside of the graph and keeps its width.
    """
    produced, consumed = table.produced(), table.consumed()
    made, read = [], []
    for (name, dim), vector in list(table.vectors.items()):
        for twin in twins.get(name, ()):
            labels: Tensor = table.vector(twin, dim, len(vector))
            table.equate(vector, labels)
            if produced[vector.numpy()].all():
                table.produce(labels)
                made.append(labels)
            if consumed[vector.numpy()].all():
                table.consume(labels)
                read.append(labels.numpy())
    components = table.components()
    inside = components[np.concatenate([np.empty(0, dtype=int), *read])]
    for labels in made:
        leaving = ~np.isin(components[labels.numpy()], inside)
        table.freeze(labels[torch.from_numpy(leaving)], 'an output of an averaged copy')
