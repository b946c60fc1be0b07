"""Live compaction: a model shrinks while it trains, with all that holds its tensors.

Parameters are replaced by smaller ones instead of being resized, since autograd and its
hooks remember the shape of those that they have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmgfp.surgery.compact import Replacement, compact_, replace_tensors_
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.tree import tree_tensors

#: The multiple of channels at which large groups stay while the model trains.
MULTIPLE = 8
REMEDY = 'leave compact_interval off, or use SGD, Adam, AdamW or their like'


def units_to_keep_in_model(
    kept: np.ndarray, in_model: np.ndarray, group_of: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Return the units that stay in a model that trains, (U,), some masked ones too.

    Kernels are slow with odd numbers of channels, and for each new number other kernels
    must be prepared. So masked units stay until enough of them are pruned: large groups
    keep a multiple of `MULTIPLE` channels, smaller ones of 4 or 2, and none more than
    an eighth above what it needs.

    Args:
        kept: Units that are not pruned, (U,).
        in_model: Units that are in the model now, (U,).
        group_of: Group of each unit, ascending, (U,).
        widths: Channels of one unit of each group, (G,).

    Examples:
        >>> import numpy as np
        >>> kept = np.arange(128) < 100
        >>> in_model, group_of = np.ones(128, bool), np.zeros(128, int)
        >>> int(units_to_keep_in_model(kept, in_model, group_of, np.array([1])).sum())
        104
    """
    need, have = (
        np.bincount(group_of[u], minlength=len(widths)) for u in (kept, in_model)
    )
    eighth = np.maximum(need * widths // 8, 1)
    multiple = np.minimum(2 ** np.log2(eighth).astype(int), MULTIPLE)
    # Units of several channels may make a multiple with fewer units.
    step = multiple // np.gcd(widths, multiple)
    extra = np.minimum(-(-need // step) * step, have) - need  # (G,)
    # The first masked units of each group are those that stay.
    spare = in_model & ~kept
    before = np.cumsum(np.bincount(group_of[spare], minlength=len(widths)))
    first = np.append(0, before[:-1])  # (G,)
    rank = np.cumsum(spare) - 1 - first[group_of]
    return kept | (spare & (rank < extra[group_of]))


@torch.no_grad()
def compact_training_(
    model: nn.Module,
    structure: PruneStructure,
    optimizers: Sequence[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Shrink a model while it trains, in place, with gradients, optimizers and copies.

    All optimizers are checked before anything is changed.

    Args:
        model: The model.
        structure: The structure to shrink it to.
        optimizers: The optimizers of its parameters.
        copies: Further models with tensors of the same names and shapes, such as an
            averaged one.

    Raises:
        ConfigError: If an optimizer keeps state of a kind that cannot shrink.
        StructureError: If the structure does not belong to the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gone = [p for n, p in parameters.items() if structure.is_gone(n)]
    shrinking = [parameters[n] for n in structure.kept if n in parameters]
    shrinking += gone
    optimizers = [inner for o in optimizers for inner in with_inner(o)]
    for optimizer in optimizers:
        check_optimizer(optimizer, shrinking)
    replacements = replace_tensors_(model, structure)
    for replacement in replacements:
        if replacement.old.grad is not None:
            replacement.new.grad = replacement.select(replacement.old.grad)
    for optimizer in optimizers:
        compact_optimizer_(optimizer, replacements)
        forget_parameters_(optimizer, gone)
    for copied in copies:
        compact_(copied, structure)


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps, as SAM and Lookahead do."""
    optimizers = [optimizer]
    for each in optimizers:
        inner = [o for o in vars(each).values() if isinstance(o, Optimizer)]
        optimizers += [o for o in inner if all(o is not known for known in optimizers)]
    return optimizers


def check_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor] = ()) -> None:
    """Refuse an optimizer whose state cannot shrink with its parameters.

    Args:
        optimizer: Any optimizer that keeps its state by parameter.
        parameters: The parameters that are going to shrink.

    Raises:
        ConfigError: If it keeps anything but single numbers and tensors of the shapes
            of its parameters, state of several parameters together, or only a share of
            the state of all processes.
    """
    expected = 'one that keeps numbers and tensors of the shapes of its parameters'
    if any(c.__name__ == 'ZeroRedundancyOptimizer' for c in type(optimizer).__mro__):
        raise ConfigError('optimizer', expected, type(optimizer).__name__, REMEDY)
    shrinking = list(parameters)
    for parameter in shrinking:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not _can_shrink(value, parameter):
                shape = list(getattr(value, 'shape', ()))
                got = f'{key} of {type(optimizer).__name__}, {type(value).__name__}'
                raise ConfigError('optimizer', expected, f'{got} {shape}', REMEDY)
    joint = _joint_state(optimizer, shrinking)
    if joint is not None:
        got = f'{joint} of {type(optimizer).__name__}, for several parameters together'
        raise ConfigError('optimizer', expected, got, REMEDY)


def _can_shrink(value: Any, parameter: Tensor) -> bool:
    """Return whether an entry of an optimizer's state can follow its parameter."""
    if isinstance(value, Tensor):
        return value.shape == parameter.shape or value.numel() == 1
    return not isinstance(value, list | tuple | dict)


def _joint_state(optimizer: Optimizer, shrinking: Sequence[Tensor]) -> str | None:
    """Return the name of something that belongs to several parameters, if any shrinks.

    L-BFGS, say, has one history of all parameters, stored under the first of them.
    """
    if not shrinking:
        return None
    ids = {id(p) for p in shrinking}
    lists = [group['params'] for group in optimizer.param_groups]
    entries_of_all = sum(p.numel() for each in lists for p in each)
    for name, value in vars(optimizer).items():
        is_known = name in ('param_groups', 'state') or any(value is x for x in lists)
        if not is_known and any(id(t) in ids for t in tree_tensors(value)):
            return name
        if type(value) is int and value == entries_of_all:
            return name
    for entries in optimizer.state.values():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, list | tuple | dict):
                return str(key)
    return None


def compact_optimizer_(
    optimizer: Optimizer, replacements: Iterable[Replacement]
) -> None:
    """Let an optimizer train the parameters that took the places of its old ones.

    Args:
        optimizer: Changed in place: its groups and its state, such as momentum.
        replacements: The replaced tensors of the model.
    """
    by_old = {id(r.old): r for r in replacements}
    for group in optimizer.param_groups:
        # In place, as some optimizers hold on to the list.
        group['params'][:] = [
            by_old[id(p)].new if id(p) in by_old else p for p in group['params']
        ]
    for old in [p for p in optimizer.state if id(p) in by_old]:
        state, replacement = optimizer.state.pop(old), by_old[id(old)]
        optimizer.state[replacement.new] = {
            key: _shrunk(value, replacement) for key, value in state.items()
        }


def forget_parameters_(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Let an optimizer forget parameters, and its state of them.

    Groups stay, empty ones too, as schedulers and checkpoints count them.

    Args:
        optimizer: Changed in place.
        parameters: Parameters that are not in the model any more.
    """
    ids = {id(p) for p in parameters}
    for group in optimizer.param_groups if ids else ():
        group['params'][:] = [p for p in group['params'] if id(p) not in ids]
    for parameter in [p for p in optimizer.state if id(p) in ids]:
        del optimizer.state[parameter]


def _shrunk(value: Any, replacement: Replacement) -> Any:
    """Return an entry of an optimizer's state for the smaller parameter."""
    shrinks = isinstance(value, Tensor) and value.shape == replacement.old.shape
    return replacement.select(value) if shrinks else value
