"""Numerical verification that removing units equals masking them."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from mmgfp.discovery.comparing import OutputCheck
from mmgfp.discovery.probing import TrainingCheck, needs_double, random_probe
from mmgfp.discovery.unit_sets import small_sets, uneven_set
from mmgfp.groups import ChannelGroup, Grouping
from mmgfp.surgery.compact import compact
from mmgfp.surgery.masking import ColumnMask
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.steps import advance_step, begin_step
from mmgfp.utils.trial_runs import Forward, LossFunction, copy_module

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


def masked_and_compact(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: np.ndarray
) -> tuple[nn.Module, nn.Module]:
    """Return a masked and a compact copy of ``model``, both of the units ``kept``."""
    masked = copy_module(model)
    ColumnMask(masked, groups).update(kept)
    structure = PruneStructure.of(groups, kept, shapes_of(model))
    return masked, compact(model, structure)


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
    return OutputCheck(forward, in_double=True)(*pair)


class _Draw:
    """One random set of units, of which those of any groups can be removed.

    Args:
        probe: The model as `random_probe` gives it, which is not changed.
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
        advance_step()
        reasons = (check(*pair) for check in self.checks)
        reason = next((reason for reason in reasons if reason), None)
        if reason:
            gc.collect()  # an error's frames, which hold the copies, form cycles
        return reason


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
    begin_step(f'verifying {len(groups)} groups by masked and compact models')
    rng = np.random.default_rng(seed)
    training = TrainingCheck(model, loss) if loss else None
    probe, in_double = random_probe(model), needs_double(model)
    outputs: list[Check] = [OutputCheck(forward, in_double=in_double)]
    # Only a whole model shows whether its loss runs; a small one compares losses.
    checks = [*outputs, *([training.runs] if training else [])]
    draw = _Draw(probe, grouping, uneven_set(groups, rng), checks)
    candidates, wrong = _reject(draw, groups, np.arange(len(groups)))
    # Groups of few units are whole again in the small model, so that each can go alone.
    has_few = np.array([g.units <= FEW for g in groups])[candidates]
    few, shrunk = candidates[has_few], candidates[~has_few]
    if len(few):
        shrunk, more = _reject(draw, groups, shrunk)
        candidates, wrong = np.sort(np.concatenate([few, shrunk])), wrong + more
    small = draw.small if len(shrunk) else probe
    left = grouping.remaining(draw.kept(shrunk))
    leaky: Check = OutputCheck(forward, leaky=True, in_double=in_double)
    # What saturates in single precision, as a sigmoid far out, hides what is before it.
    checks = [OutputCheck(forward, in_double=True), leaky]
    checks += [training.agrees] if training else []
    kinds = (checks, *[[*outputs, leaky]] * 2)
    for kept, chosen in zip(small_sets(left.groups, rng), kinds, strict=True):
        draw = _Draw(small, left, kept, chosen)
        candidates, more = _reject(draw, groups, candidates)
        wrong += more
    return wrong


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
