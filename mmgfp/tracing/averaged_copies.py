"""Averaged copies inside a model, such as the momentum encoder of a contrastive one.

An update outside of any graph lets a copy follow its original, parameter by parameter.
The copy must therefore keep the original's shapes: it loses the same channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.tracing.labels import LabelTable
from mmgfp.utils.trial_runs import FrozenParameters


def averaged_copy_tensors(
    model: nn.Module, frozen: FrozenParameters | None = None
) -> dict[str, list[str]]:
    """Return the names of the copies of each parameter and buffer, by its own name.

    A copy is known by the interface of `torch.optim.swa_utils.AveragedModel`, which
    MMEngine's averaged models share, or by parameters that the model itself moves
    towards those of another module; its original, by class and by the names and shapes
    of its tensors.

    Args:
        model: The model, after its loss was computed.
        frozen: Its parameters without gradient as they were before.
    """
    pairs: list[tuple[str, str, nn.Module]] = []
    averaged = dict(_averaged(model))
    for path, module in averaged.items():
        for part_path, part in _parts(path, module):
            original = next(_originals(model, averaged, part), None)
            if original is not None:
                pairs.append((original, part_path, part))
    if frozen is not None:
        pairs += _followers(model, frozen, averaged)
    copies: dict[str, list[str]] = {}
    for original, path, module in pairs:
        for name in module.state_dict():
            copies.setdefault(f'{original}.{name}', []).append(f'{path}.{name}')
    return copies


def _averaged(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside of averaged models, by name."""
    for path, module in model.named_modules():
        inner = getattr(module, 'module', None)
        if hasattr(module, 'update_parameters') and isinstance(inner, nn.Module):
            yield f'{path}.module', inner


def _followers(
    model: nn.Module, frozen: FrozenParameters, averaged: Collection[str]
) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the names of original and copy, and the copy, where code updates it."""
    before, changed = frozen.values(), frozen.changed()
    inside: list[str] = [*averaged]
    for path, module in model.named_modules() if any(changed.values()) else ():
        names = [f'{path}.{name}' for name, _ in module.named_parameters()]
        if _is_in(path, inside) or not all(name in changed for name in names):
            continue
        if not any(changed[name] for name in names):
            continue
        for original in _originals(model, [path, *averaged], module):
            if _follows(model, original, path, before, changed):
                inside.append(path)
                yield original, path, module
                break


def _follows(
    model: nn.Module,
    original: str,
    copy: str,
    before: Mapping[str, Tensor],
    changed: Mapping[str, bool],
) -> bool:
    """Return whether all parameters of a copy went some way towards the original's.

    A norm that is limited, or a scale that is clamped, goes elsewhere. Where copy and
    original were equal before, all have to be written to.
    """
    targets = dict(model.get_submodule(original).named_parameters())
    has_moved, are_written = False, True
    for name, parameter in model.get_submodule(copy).named_parameters():
        if name not in targets:
            return False
        old = before[f'{copy}.{name}'].float()
        way = targets[name].detach().float() - old
        step = parameter.detach().float() - old
        are_written &= changed[f'{copy}.{name}']
        if not way.any() and not step.any():
            continue
        share = float((step * way).sum() / way.square().sum())
        beside = float((step - share * way).square().sum())
        # Rounding is much of a small step; NaN compares as false.
        if not (share > 0 and beside <= 1e-2 * float(step.square().sum())):
            return False
        has_moved = True
    return has_moved or are_written


def _is_in(path: str, parents: Collection[str]) -> bool:
    return any(f'{path}.'.startswith(f'{parent}.') for parent in parents)


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that were copied, by name.

    A container is taken apart: it may have been put together for the copy alone.
    """
    if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        for name, child in module.named_children():
            yield from _parts(f'{path}.{name}', child)
    else:
        yield path, module


def _originals(
    model: nn.Module, copies: Collection[str], part: nn.Module
) -> Iterator[str]:
    """Yield the names of modules, in none of ``copies``, that ``part`` may copy."""
    shapes = _shapes(part)
    for name, module in model.named_modules() if shapes else ():
        if type(module) is not type(part) or _is_in(name, copies):
            continue
        if _shapes(module) == shapes:
            yield name


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
