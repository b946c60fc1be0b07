"""Numerical verification that removing units equals masking them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.discovery.leaky import in_leaky_mode
from mmgfp.discovery.probing import TrainingCheck, error_line, random_probe, run
from mmgfp.groups import ChannelGroup, Grouping
from mmgfp.surgery.compact import compact
from mmgfp.surgery.masking import ColumnMask
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import Forward, LossFunction, copy_module

#: Largest difference of an output, see `difference`, that still counts as equal.
TOLERANCE = 1e-4
#: Outputs above this say nothing of the size of the others, if there are any.
HUGE = 1e4
#: Groups of so few units are verified whole, unit by unit.
FEW = 3

#: Returns why a masked and a compact copy disagree, None if they agree.
Check = Callable[[nn.Module, nn.Module], str | None]


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
    return _units(groups, _counts(groups, share), rng)


def _counts(groups: Sequence[ChannelGroup], share: float | np.ndarray) -> np.ndarray:
    """Return how many units make up a ``share`` of each group, (G,)."""
    units = np.array([g.units for g in groups], dtype=int)
    shares = np.broadcast_to(share, len(groups))
    return np.minimum(np.maximum(np.round(shares * units), 1), units - 1).astype(int)


def _units(
    groups: Sequence[ChannelGroup],
    counts: np.ndarray,
    rng: np.random.Generator,
    spare_ends: bool = False,
) -> np.ndarray:
    """Draw the units to keep: all but so many of each group, (U,).

    With ``spare_ends`` the first and the last unit of a group go after all others.
    """
    parts = []
    for group, count in zip(groups, counts, strict=True):
        kept = np.ones(group.units, dtype=bool)
        order = rng.permutation(group.units)
        if spare_ends:
            is_end = np.isin(order, (0, group.units - 1))
            order = np.concatenate([order[~is_end], order[is_end]])
        kept[order[:count]] = False
        parts.append(kept)
    return np.concatenate([np.ones(0, dtype=bool), *parts])


def _without(groups: Sequence[ChannelGroup], unit: int) -> np.ndarray:
    """Return the units to keep, (U,): all but one of each group, if it has others.

    Args:
        groups: The groups.
        unit: Which unit of each group goes, 0 for the first and -1 for the last.
    """
    parts = []
    for group in groups:
        kept = np.ones(group.units, dtype=bool)
        kept[unit] = group.units == 1
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

    Each element's is relative to its value in the first tree, or to the `typical_size`
    of its tensor where that is larger.

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
            scale = x.abs().clamp(min=typical_size(x))
            worst = max(worst, float(((x - y).abs() / scale).max()))
    return worst if pairs else float('inf')


def typical_size(x: Tensor) -> float:
    """Return the median magnitude of a tensor's ordinary elements, at least 1e-12.

    Zeros are not ordinary, nor are values such as the -1e9 that stands for a masked
    position, which would hide a difference elsewhere, nor what rounding leaves of zero.

    Examples:
        >>> import torch
        >>> typical_size(torch.tensor([0, 0, 0, 0.5, 1, 2, -1e9, -1e9, -1e9, -1e9]))
        1.0
    """
    sizes = x.detach().abs()
    sizes = sizes[sizes > 0]
    if not sizes.numel():
        return 1e-12
    # A share of the largest, since rounding errors grow with it.
    least = 1e-10 * min(float(sizes.max()), 1e10)
    moderate = sizes[sizes <= HUGE]
    if moderate.numel():
        sizes = moderate[moderate >= 1e-9 * moderate.max()]
    return max(float(sizes.median()), least, 1e-12)


def disagreement(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: np.ndarray,
    forward: Forward,
) -> str | None:
    """Compare a masked and a compact copy of ``model``.

    Both run in double precision and in eval mode, with norms, biases and what starts
    near zero set at random so that no layer is blind to its inputs.

    Returns:
        str | None: Why they disagree; None if they agree.

    Raises:
        Exception: If ``forward`` fails for the masked copy, which is no fault of the
            groups, or memory runs out.
    """
    pair = masked_and_compact(random_probe(model), groups, kept)
    return _compare(*pair, forward)


@torch.no_grad()
def _compare(masked: nn.Module, small: nn.Module, forward: Forward) -> str | None:
    # The masked copy runs first: its errors are those of the model or of the call.
    return _difference_from(run(masked, forward), small, forward)


@torch.no_grad()
def _difference_from(expected: Any, small: nn.Module, forward: Forward) -> str | None:
    try:
        outputs = run(small, forward)
    except Exception as error:  # any error here means that the groups are wrong
        return error_line(error)
    try:
        worst = difference(expected, outputs)
    except ValueError:
        return 'another number of outputs'
    if worst == float('inf'):
        return 'outputs differ in shape, or are not finite'
    return None if worst <= TOLERANCE else f'outputs differ by {worst:.2g}'


@torch.no_grad()
def _compare_leaky(masked: nn.Module, small: nn.Module, forward: Forward) -> str | None:
    """Compare where nothing is dead on the batch, unless code counts on ReLU."""
    leaky = in_leaky_mode(forward)
    try:
        expected = run(masked, leaky)
    except Exception as error:
        error_line(error)  # raises it if memory ran out
        return None
    if not all(x.isfinite().all() for x in tree_tensors(expected)):
        return None
    return _difference_from(expected, small, leaky)


class _Draw:
    """One random set of units, of which those of any groups can be removed.

    Args:
        probe: The model in double precision, which is not changed.
        grouping: Its groups.
        drawn: Units to keep, (U,).
        checks: Return why a masked and a compact copy disagree, if they do.
    """

    def __init__(
        self,
        probe: nn.Module,
        grouping: Grouping,
        drawn: np.ndarray,
        checks: Sequence[Check],
    ) -> None:
        self.probe, self.grouping = probe, grouping
        self.drawn, self.checks = drawn, checks

    def kept(self, members: np.ndarray) -> np.ndarray:
        """Return the units to keep, (U,), if only these groups lose any."""
        return self.drawn | ~np.isin(self.grouping.group_of, members)

    def trial(self, members: np.ndarray) -> str | None:
        """Return why removing units of these groups does not equal masking them."""
        groups = self.grouping.groups
        pair = masked_and_compact(self.probe, groups, self.kept(members))
        self.small = pair[1]
        reasons = (check(*pair) for check in self.checks)
        return next((reason for reason in reasons if reason), None)


def find_disagreements(
    model: nn.Module,
    grouping: Grouping,
    forward: Forward,
    seed: int = 0,
    loss: LossFunction | None = None,
) -> list[Disagreement]:
    """Remove random units of all groups; where that fails, find the wrong groups.

    Several sets are removed: one that leaves a small model, then others from that. A
    wrong group is found by halving. The groups of the same layers in other blocks are
    rejected with it, since code that fails in one block fails in the next.

    Args:
        model: The traced model, not masked yet.
        grouping: Its groups.
        forward: Calls a copy of the model and returns all outputs.
        seed: Seed of the random units.
        loss: Computes the training loss of a copy, which is compared as well.
    """
    groups = grouping.groups
    if not groups:
        return []
    rng = np.random.default_rng(seed)
    training = TrainingCheck(model, loss) if loss else None
    outputs: list[Check] = [partial(_compare, forward=forward)]
    probe = random_probe(model)
    # Only a whole model shows whether its loss runs; a small one compares losses.
    checks = [*outputs, training.runs] if training else outputs
    kept = _units(groups, _uneven_counts(groups, rng), rng, spare_ends=True)
    draw = _Draw(probe, grouping, kept, checks)
    candidates, wrong = _reject(draw, groups, np.arange(len(groups)))
    # Groups of few units are whole again in the small model, so that each can go alone.
    has_few = np.array([g.units <= FEW for g in groups])[candidates]
    few, shrunk = candidates[has_few], candidates[~has_few]
    if len(few):
        shrunk, more = _reject(draw, groups, shrunk)
        candidates, wrong = np.sort(np.concatenate([few, shrunk])), wrong + more
    small = draw.small if len(shrunk) else probe
    left = grouping.remaining(draw.kept(shrunk))

    both: list[Check] = [*outputs, partial(_compare_leaky, forward=forward)]
    checks = [*both, training.agrees] if training else both
    sets = zip(_small_sets(left.groups, rng), (checks, both, both), strict=True)
    for kept, chosen in sets:
        draw = _Draw(small, left, kept, chosen)
        candidates, more = _reject(draw, groups, candidates)
        wrong += more
    return wrong


def _small_sets(
    groups: Sequence[ChannelGroup], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the units to keep, (U,), in three sets that leave a small model.

    Where code centres channels, as pads on both sides, the first unit of a group may go
    or the last one, by whether their number is even, but not both.
    """
    odd = _units(groups, _odd_counts(groups, rng), rng)
    return [odd, _without(groups, 0), _without(groups, -1)]


def _reject(
    draw: _Draw, groups: Sequence[ChannelGroup], candidates: np.ndarray
) -> tuple[np.ndarray, list[Disagreement]]:
    """Return the candidates whose units can be removed, and why others cannot.

    Args:
        draw: The units to remove.
        groups: All groups.
        candidates: Numbers of the groups to remove them from.
    """
    wrong: list[Disagreement] = []
    while len(candidates) and (reason := draw.trial(candidates)):
        members, reason = _narrow(candidates, reason, draw.trial)
        patterns = {_pattern(groups[g]) for g in members}
        rejected = np.array([_pattern(groups[g]) in patterns for g in candidates])
        wrong += [Disagreement(groups[g], reason) for g in candidates[rejected]]
        candidates = candidates[~rejected]
    return candidates, wrong


def _uneven_counts(
    groups: Sequence[ChannelGroup], rng: np.random.Generator
) -> np.ndarray:
    """Return how many units to remove from each group, (G,): very different shares.

    A split in halves must not go well because both happen to lose as many channels.
    The shares are large, so that the draws that follow work on a small model.
    """
    shares = np.resize([0.5, 0.8], len(groups)) + rng.uniform(0, 0.15, len(groups))
    units = np.array([g.units for g in groups], dtype=int)
    # The next draw needs two units to remove one. Counts that differ by one alone may
    # still go well, as where code rounds.
    most = units - np.where(units > 3, 2, 1) - np.resize([2, 0], len(groups))
    return np.minimum(_counts(groups, shares), np.maximum(most, units > 1))


def _odd_counts(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> np.ndarray:
    """Return 1 for every other group, for the rest an odd number below a half, (G,).

    What is to be removed in pairs, or in equal parts, cannot do so by chance.
    """
    counts = [
        1 if i % 2 else 1 + 2 * rng.integers(0, max(g.units // 4, 1))
        for i, g in enumerate(groups)
    ]
    units = np.array([g.units for g in groups], dtype=int)
    return np.minimum(np.array(counts, dtype=int), units - 1)


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
