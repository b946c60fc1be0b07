"""Averaged copies inside a model, such as the momentum encoder of a contrastive one.

An update outside of any graph lets a copy follow its original, parameter by parameter.
The copy must therefore keep the original's shapes: it loses the same channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.tracing.labels import LabelTable


def averaged_copy_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the copies of each parameter and buffer, by its own name.

    A copy is known by the interface of `torch.optim.swa_utils.AveragedModel`, which
    MMEngine's averaged models share; its original, by class and by the names and
    shapes of its tensors.
    """
    copies: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        inner = getattr(module, 'module', None)
        if not (hasattr(module, 'update_parameters') and isinstance(inner, nn.Module)):
            continue
        for part_path, part in _parts(f'{path}.module', inner):
            original = _original(model, path, part)
            if original is not None:
                for name in part.state_dict():
                    names = copies.setdefault(f'{original}.{name}', [])
                    names.append(f'{part_path}.{name}')
    return copies


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that were copied, by name.

    A container is taken apart: it may have been put together for the copy alone.
    """
    if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        for name, child in module.named_children():
            yield from _parts(f'{path}.{name}', child)
    else:
        yield path, module


def _original(model: nn.Module, copy: str, part: nn.Module) -> str | None:
    """Return the name of the module that ``part``, inside of ``copy``, is a copy of."""
    shapes = _shapes(part)
    originals = (
        name
        for name, module in model.named_modules()
        if type(module) is type(part)
        and name != copy
        and not name.startswith(f'{copy}.')
        and _shapes(module) == shapes
    )
    return next(originals, None) if shapes else None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def couple_averaged_copies(table: LabelTable, copies: dict[str, list[str]]) -> None:
    """Let copies lose the channels that their originals lose, and be masked like them.

    What leaves a copy meets other tensors outside of the graph and keeps its width.

    Args:
        table: The labels of the originals; the copies get theirs here.
        copies: The result of `averaged_copy_tensors`.
    """
    is_produced, is_consumed = table.produced(), table.consumed()
    outputs, inputs = [], []
    # A list, since the loop adds the copies' vectors.
    for (name, dim), original in list(table.vectors.items()):
        for copy in copies.get(name, ()):
            labels: Tensor = table.vector(copy, dim, len(original))
            table.equate(original, labels)
            if is_produced[original.numpy()].all():
                table.produce(labels)
                outputs.append(labels)
            if is_consumed[original.numpy()].all():
                table.consume(labels)
                inputs.append(labels.numpy())
    # Channels that no layer inside of any copy reads are outputs of a copy.
    components = table.components()
    inside = components[np.concatenate([np.empty(0, dtype=int), *inputs])]
    for labels in outputs:
        leaving = ~np.isin(components[labels.numpy()], inside)
        table.freeze(labels[torch.from_numpy(leaving)], 'an output of an averaged copy')
