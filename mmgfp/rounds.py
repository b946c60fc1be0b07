"""The cuts of a pruning without training: where they end, and what they did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.compensation.reports import LayerReport
from mmgfp.discovery.discover import Discovery
from mmgfp.selection.costs import Totals
from mmgfp.selection.greedy import Limits
from mmgfp.selection.targets import Target
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check_count

#: The share of a cost that one cut leaves at least: smaller ones lose less in the end.
STEP = 0.75


@dataclass(frozen=True)
class Round:
    """One cut, and how the model was made up for it.

    Attributes:
        target: Where the cut ended.
        totals: Costs that remain.
        share: The share of the target's cost that remains.
        units: Numbers of the units that went.
        layers: What became of the layers that the cut reaches; empty without
            compensation.
        norms: Batch norms whose statistics were moved.
    """

    target: Target
    totals: Totals
    share: float
    units: np.ndarray
    layers: tuple[LayerReport, ...] = ()
    norms: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain types and tensors, as a checkpoint holds them."""
        return {
            'target': {self.target.cost: self.target.ratio},
            'totals': {k: float(v) for k, v in self.totals.values.items()},
            'share': float(self.share),
            'units': torch.from_numpy(self.units.copy()),
            'layers': [asdict(layer) for layer in self.layers],
            'norms': list(self.norms),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Round:
        """Read what `to_dict` gave."""
        return cls(
            Target.parse(raw['target']),
            Totals(dict(raw['totals'])),
            raw['share'],
            raw['units'].numpy(),
            tuple(LayerReport(**layer) for layer in raw['layers']),
            tuple(raw['norms']),
        )


@dataclass(frozen=True)
class Pruned:
    """A model that was pruned without training.

    Attributes:
        model: The compact model.
        structure: What it keeps of the original.
        full: Costs of the original.
        rounds: All cuts, the last one to the target.
        discovery: The facts about the original.
        kept: Its units that stay, (U,).
        importance: Importance of its units before the last cut, (U,).
        limits: How far each of its groups could shrink.
    """

    model: nn.Module
    structure: PruneStructure
    full: Totals
    rounds: tuple[Round, ...]
    discovery: Discovery
    kept: np.ndarray
    importance: np.ndarray | None
    limits: Limits

    @property
    def totals(self) -> Totals:
        """Costs of the compact model."""
        return self.rounds[-1].totals


@dataclass(frozen=True)
class Journal:
    """Follows a pruning without training, and lets an interrupted one go on.

    Attributes:
        report: Called with a line on what begins.
        prepared: Called once it is known that the target can be reached.
        after_round: Called after each round with what it did, and with a state in plain
            types and tensors, as a weights-only checkpoint holds them.
        state: The state after some round of an interrupted run with the same arguments;
            the result is the one that this run would have had, bit by bit. None begins
            anew.
    """

    report: Callable[[str], None] = lambda line: None
    prepared: Callable[[], None] = lambda: None
    after_round: Callable[[Round, dict[str, Any]], None] = lambda done, state: None
    state: Mapping[str, Any] | None = None


def stations(ratio: float, rounds: int | Sequence[float] | None = None) -> list[float]:
    """Return the shares of a cost at which cuts end, falling, down to a target.

    Args:
        ratio: The target.
        rounds: The number of cuts, or the shares before the last one; by default as
            many as take a quarter or less each.

    Raises:
        ConfigError: If shares do not fall from 1 to the target.

    Examples:
        >>> [round(share, 3) for share in stations(0.5)]
        [0.794, 0.63, 0.5]
        >>> [round(share, 3) for share in stations(0.35)]
        [0.769, 0.592, 0.455, 0.35]
        >>> stations(0.35, [0.7, 0.5])
        [0.7, 0.5, 0.35]
    """
    if rounds is None:
        needed = math.log(ratio) / math.log(STEP)
        rounds = max(math.ceil(needed - 1e-9), 1)  # 3 for STEP³, despite rounding
    if not isinstance(rounds, Sequence):
        check_count('rounds', rounds, 'a whole number of at least 1, or shares')
        return [ratio ** (k / rounds) for k in range(1, rounds)] + [ratio]
    shares = [*rounds, ratio]
    if not all(a > b for a, b in zip([1.0, *shares], shares, strict=False)):
        expected = f'shares that fall from below 1 to above {ratio:g}'
        raise ConfigError('rounds', expected, repr(rounds), 'leave them out')
    return shares
