"""Live compaction: a model that trains is cut, and what hangs on its tensors follows.

Parameters are replaced by smaller ones, since autograd and its hooks remember the shape
of those that they have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmgfp.surgery.compact import Cut, cut
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError

#: Most channels that a large group keeps a multiple of while it is cut.
MULTIPLE = 8
REMEDY = 'leave compact_interval off, or use SGD, Adam, AdamW or their like'


def units_to_keep_in_model(
    kept: np.ndarray, in_model: np.ndarray, group_of: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Units that a cut leaves in the model, (U,), some masked ones among them.

    Kernels are slow with odd numbers of channels, and each new number costs the making
    of new ones. So masked units stay until enough have gone: large groups keep a
    multiple of `MULTIPLE` channels, smaller ones of 4 or 2, and none more than an
    eighth above what it needs.

    Args:
        kept: Units that were not pruned, (U,).
        in_model: Units that are in the model, (U,).
        group_of: Group of each unit, ascending, (U,).
        widths: Channels of one unit of each group, (G,).
    """
    need, have = (
        np.bincount(group_of[u], minlength=len(widths)) for u in (kept, in_model)
    )
    eighth = np.maximum(need * widths // 8, 1)
    multiple = np.minimum(2 ** np.log2(eighth).astype(int), MULTIPLE)
    step = multiple // np.gcd(widths, multiple)
    extra = np.minimum(-(-need // step) * step, have) - need  # (G,)
    spare = in_model & ~kept
    before = np.cumsum(np.bincount(group_of[spare], minlength=len(widths)))
    first = np.append(0, before[:-1])  # (G,)
    rank = np.cumsum(spare) - 1 - first[group_of]
    return kept | (spare & (rank < extra[group_of]))


@torch.no_grad()
def cut_live(
    model: nn.Module,
    structure: PruneStructure,
    optimizers: Sequence[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Shrink a model that trains, with its gradients and all that goes with it.

    What is refused is refused before anything is changed.

    Args:
        model: The model, shrunk in place.
        structure: What it is cut down to.
        optimizers: Those that train its parameters.
        copies: Further models with tensors of the same names and shapes, such as an
            averaged one.

    Raises:
        ConfigError: An optimizer holds what nobody can tell how to cut.
        StructureError: The structure does not belong to the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shrinking = [parameters[n] for n in structure.kept if n in parameters]
    for optimizer in optimizers:
        check_optimizer(optimizer, shrinking)
    cuts = cut(model, structure)
    for made in cuts:
        if made.old.grad is not None:
            made.new.grad = made.of(made.old.grad)
    for optimizer in optimizers:
        cut_optimizer(optimizer, cuts)
    for copied in copies:
        cut(copied, structure)


def check_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor] = ()) -> None:
    """Refuse an optimizer whose state cannot follow.

    Args:
        optimizer: Of any kind that keeps its state by parameter.
        parameters: Those that are to shrink.

    Raises:
        ConfigError: It keeps something that is neither a number nor has an entry for
            each one of its parameter, or only a share of all.
    """
    expected = 'one that keeps numbers and tensors of the shapes of its parameters'
    if any(c.__name__ == 'ZeroRedundancyOptimizer' for c in type(optimizer).__mro__):
        raise ConfigError('optimizer', expected, type(optimizer).__name__, REMEDY)
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            fine = not isinstance(value, Tensor | list | tuple | dict)
            if isinstance(value, Tensor):
                fine = value.shape == parameter.shape or value.numel() == 1
            if not fine:
                shape = list(getattr(value, 'shape', ()))
                got = f'{key} of {type(optimizer).__name__}, {type(value).__name__}'
                raise ConfigError('optimizer', expected, f'{got} {shape}', REMEDY)


def cut_optimizer(optimizer: Optimizer, cuts: Iterable[Cut]) -> None:
    """Let an optimizer train the parameters that took the places of its own.

    Args:
        optimizer: Changed in place: its groups and its state, such as momentum.
        cuts: What became of the parameters.
    """
    made = {id(c.old): c for c in cuts}
    for group in optimizer.param_groups:
        group['params'] = [
            made[id(p)].new if id(p) in made else p for p in group['params']
        ]
    for old in [p for p in optimizer.state if id(p) in made]:
        state = optimizer.state.pop(old)
        new = made[id(old)]
        optimizer.state[new.new] = {k: _followed(v, new) for k, v in state.items()}


def _followed(value: Any, made: Cut) -> Any:
    """An entry of an optimizer's state for the smaller parameter."""
    whole = isinstance(value, Tensor) and value.shape == made.old.shape
    return made.of(value) if whole else value
