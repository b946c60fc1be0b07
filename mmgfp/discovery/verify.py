"""Numerical verification that removing units equals masking them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.groups import ChannelGroup, Grouping
from mmgfp.surgery.compact import compact
from mmgfp.surgery.masking import ColumnMask
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.precision import InDouble
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import Forward, copy_module, undisturbed

#: Largest difference, relative to the largest output, that still counts as equal.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Disagreement:
    """A group whose removal does not equal its mask.

    Attributes:
        group: The group.
        reason: What differed, or the error that the compact model raised.
    """

    group: ChannelGroup
    reason: str


def random_units(
    groups: Sequence[ChannelGroup],
    share: float | np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw the units to keep: all but a random ``share`` of each group, (U,).

    Each group keeps at least one unit and, unless it has no other, loses one.

    Args:
        groups: The groups.
        share: One share for all groups, or one for each, (G,).
        rng: The generator to draw with.
    """
    parts = []
    shares = np.broadcast_to(share, len(groups))
    for group, group_share in zip(groups, shares, strict=True):
        kept = np.ones(group.units, dtype=bool)
        count = min(max(round(group_share * group.units), 1), group.units - 1)
        kept[rng.permutation(group.units)[:count]] = False
        parts.append(kept)
    return np.concatenate([np.ones(0, dtype=bool), *parts])


def masked_and_compact(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: np.ndarray
) -> tuple[nn.Module, nn.Module]:
    """Return a masked and a compact copy of ``model``, both of the units ``kept``."""
    masked = copy_module(model)
    ColumnMask(masked, groups).update(kept)
    structure = PruneStructure.of(groups, kept, shapes_of(model))
    return masked, compact(model, structure)


def difference(a: Any, b: Any) -> float:
    """Return the largest difference between two trees of tensors.

    It is relative to the largest value of the tensor in the first tree.

    Returns:
        float: 0 for equal trees, infinity where shapes differ or a value is not finite.

    Raises:
        ValueError: If the trees hold different numbers of tensors.

    Examples:
        >>> import torch
        >>> difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]))
        0.25
    """
    worst = 0.0
    pairs = list(zip(tree_tensors(a), tree_tensors(b), strict=True))
    for x, y in pairs:
        if x.shape != y.shape or not (x.isfinite().all() and y.isfinite().all()):
            return float('inf')
        if x.numel():
            scale = max(float(x.abs().max()), 1e-12)
            worst = max(worst, float((x - y).abs().max()) / scale)
    return worst if pairs else float('inf')


@torch.no_grad()
def disagreement(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: np.ndarray,
    forward: Forward,
) -> str | None:
    """Compare a masked and a compact copy of ``model``.

    Both run in double precision and in eval mode, with norms and biases set at random
    so that no layer is blind to its inputs.

    Returns:
        str | None: Why they disagree; None if they agree.

    Raises:
        Exception: If ``forward`` fails for the masked copy, which is no fault of the
            groups.
    """
    probe = copy_module(model).double()
    probe.eval()  # returns nothing where distillation overrides it
    _randomize_norms(probe)
    masked, small = masked_and_compact(probe, groups, kept)
    # The masked copy runs first: its errors are those of the model or of the call.
    expected = _outputs(masked, forward)
    try:
        outputs = _outputs(small, forward)
    except Exception as error:  # any error here means that the groups are wrong
        return f'{type(error).__name__}: {str(error)}'.splitlines()[0]
    try:
        worst = difference(expected, outputs)
    except ValueError:
        return 'another number of outputs'
    if worst == float('inf'):
        return 'outputs differ in shape, or are not finite'
    return None if worst <= TOLERANCE else f'outputs differ by {worst:.2g}'


def _outputs(model: nn.Module, forward: Forward) -> Any:
    with undisturbed(model), InDouble():
        torch.manual_seed(0)
        return forward(model)


def find_disagreements(
    model: nn.Module, grouping: Grouping, forward: Forward, seed: int = 0
) -> list[Disagreement]:
    """Remove random units of all groups; where that fails, find the wrong groups.

    A wrong group is found by halving. The groups of the same layers in other blocks
    are rejected with it, since code that fails in one block fails in the next.

    Args:
        model: The traced model, not masked yet.
        grouping: Its groups.
        forward: Calls a copy of the model and returns all outputs.
        seed: Seed of the random units.
    """
    groups = grouping.groups
    rng = np.random.default_rng(seed)
    # Neighbours lose very different shares: a split in halves must not go well because
    # both happen to lose as many channels.
    shares = np.resize([0.1, 0.5], len(groups)) + rng.uniform(0, 0.2, len(groups))
    drawn = random_units(groups, shares, rng)
    group_of = grouping.group_of

    def trial(members: np.ndarray) -> str | None:
        kept = drawn | ~np.isin(group_of, members)
        return disagreement(model, groups, kept, forward)

    candidates = np.arange(len(groups))
    disagreements: list[Disagreement] = []
    while len(candidates) and (reason := trial(candidates)):
        wrong, reason = _narrow(candidates, reason, trial)
        patterns = {_pattern(groups[g]) for g in wrong}
        rejected = np.array([_pattern(groups[g]) in patterns for g in candidates])
        disagreements += [Disagreement(groups[g], reason) for g in candidates[rejected]]
        candidates = candidates[~rejected]
    return disagreements


def _narrow(
    members: np.ndarray, reason: str, trial: Callable[[np.ndarray], str | None]
) -> tuple[np.ndarray, str]:
    """Return one group that fails on its own, or several that only do so together."""
    while len(members) > 1:
        half = len(members) // 2
        for part in (members[:half], members[half:]):
            if part_reason := trial(part):
                members, reason = part, part_reason
                break
        else:
            break
    return members, reason


def _pattern(group: ChannelGroup) -> frozenset[tuple[str, int, str]]:
    """Return what a group shares with the groups of the same layers in other blocks."""
    return frozenset(
        (re.sub(r'\b\d+\b', '*', m.name), m.dim, m.role) for m in group.members
    )


def _randomize_norms(model: nn.Module) -> None:
    """Set biases, norms and their statistics at random.

    A norm that starts at zero, as at the end of a residual branch, would hide what
    comes before it.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() != 1 or not tensor.is_floating_point():
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        noise = noise.to(tensor.device)
        if name.endswith('running_var'):  # scaled: else activations may overflow
            tensor.mul_(noise + 0.5).clamp_(min=1e-3)
        elif name.endswith('running_mean'):
            tensor.add_((noise - 0.5) * 0.2)
        else:
            positive = name.endswith(('weight', 'gamma'))
            tensor.copy_(noise + 0.5 if positive else (noise - 0.5) * 0.2)
