"""Which weights stay, as pure functions of weights and scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmgfp.utils.errors import StatisticsError


def keep_largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks of the ``count`` largest scores of all tensors together.

    Of equal scores the first ones are kept, in the order of the tensors and of their
    entries, so that processes and resumed runs agree.

    Args:
        scores: Tensors of any shapes.
        count: How many entries to keep.

    Raises:
        StatisticsError: If a score is NaN or infinite.

    Examples:
        >>> masks = keep_largest([torch.tensor([3.0, 1.0]), torch.tensor([1.0])], 2)
        >>> [mask.tolist() for mask in masks]
        [[True, True], [False]]
    """
    # On the CPU: selection on a GPU is not among torch's deterministic algorithms.
    flat = np.concatenate([_numbers(s).reshape(-1) for s in scores])
    if not np.isfinite(flat).all():
        raise StatisticsError(
            'weights and their scores',
            'finite when weights are chosen',
            'NaN or infinity',
            'lower the learning rate, or clip gradients',
        )
    kept = np.zeros(flat.shape, dtype=bool)
    if count > 0:
        least = np.partition(flat, len(flat) - count)[len(flat) - count]
        kept = flat > least
        equal = np.flatnonzero(flat == least)
        kept[equal[: count - int(kept.sum())]] = True
    parts = torch.from_numpy(kept).split([s.numel() for s in scores])
    pairs = zip(parts, scores, strict=True)
    return [part.reshape(s.shape).to(s.device) for part, s in pairs]


def _numbers(scores: Tensor) -> np.ndarray:
    scores = scores.detach().cpu()
    return (scores if scores.dtype == torch.float64 else scores.float()).numpy()


def keep_n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Return a mask of the ``n`` largest weights of every ``m`` along the inputs.

    A group is ``m`` consecutive input channels of one output channel, and of one
    position of the kernel, as NVIDIA's sparse tensor cores want them
    (docs/sparsity.md). Of equal weights the first ones are kept.

    Args:
        weight: The weight, (C_out, C_in, ...), where ``m`` divides C_in.
        n: Weights to keep of each group.
        m: Weights of a group.

    Examples:
        >>> keep_n_of_m(torch.tensor([[1.0, -3.0, 2.0, 2.0]]), 2, 4).tolist()
        [[False, True, True, False]]
    """
    parts = in_groups(weight.detach().abs(), m).movedim(-1, 0).contiguous()
    # Ranks within groups by comparing pairs: a sort takes several times as long.
    rank = torch.zeros(parts.shape, dtype=torch.int16, device=parts.device)
    for first in range(m):
        for second in range(first + 1, m):
            is_larger = parts[second] > parts[first]
            rank[first] += is_larger
            rank[second] += ~is_larger
    return (rank < n).movedim(0, -1).flatten(-2).movedim(-1, 1).contiguous()


def in_groups(weight: Tensor, m: int) -> Tensor:
    """Return the weights of each group, (C_out, ..., C_in / m, m)."""
    return weight.movedim(1, -1).unflatten(-1, (-1, m))


def follows_pattern(weight: Tensor, n: int, m: int) -> bool:
    """Return whether at most ``n`` of every ``m`` weights along inputs are not zero.

    Args:
        weight: The weight, (C_out, C_in, ...); one whose C_in is no multiple of ``m``
            has no such groups.
        n: Weights that a group may have.
        m: Weights of a group.

    Examples:
        >>> follows_pattern(torch.tensor([[1.0, 0.0, 2.0, 0.0]]), 2, 4)
        True
        >>> follows_pattern(torch.ones(2, 6), 2, 4)
        False
    """
    if weight.dim() < 2 or weight.shape[1] % m:
        return False
    return bool((in_groups(weight, m).count_nonzero(-1) <= n).all())
