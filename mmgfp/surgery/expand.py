"""The inverse of compaction: weights of a compact model, written into the whole one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmgfp.surgery.structure import PruneStructure


@torch.no_grad()
def take_over(
    model: nn.Module, small: nn.Module, structure: PruneStructure
) -> list[str]:
    """Write the tensors of a compact model to where they belong in the original.

    All other entries of the original stay, such as masked columns at zero.

    Args:
        model: A model of the original's shape, in place.
        small: The compact model.
        structure: What it keeps of each tensor.

    Returns:
        list: Names of the tensors of which an entry is another one now.

    Examples:
        >>> full, part = nn.Linear(2, 3), nn.Linear(2, 1)
        >>> kept = {'weight': {0: [2]}, 'bias': {0: [2]}}
        >>> sizes = {'weight': [3, 2], 'bias': [3]}
        >>> take_over(full, part, PruneStructure(sizes=sizes, kept=kept))
        ['weight', 'bias']
        >>> bool((full.weight[2] == part.weight[0]).all())
        True
    """
    changed = []
    tensors = small.state_dict()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # extra state of a module
            continue
        if structure.is_gone(name):
            continue
        kept = structure.kept.get(name, {})
        index = tuple(
            torch.tensor(entries, device=tensor.device).view(-1, *[1] * behind)
            for entries, behind in zip(
                [kept.get(dim, range(size)) for dim, size in enumerate(tensor.shape)],
                reversed(range(tensor.dim())),
                strict=True,
            )
        )
        if not torch.equal(tensor[index], tensors[name]):
            tensor[index] = tensors[name]
            changed.append(name)
    return changed
