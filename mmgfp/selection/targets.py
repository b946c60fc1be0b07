"""Targets: shares of a cost at which pruning ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from typing import Any

from mmgfp.selection.costs import COSTS, Totals
from mmgfp.utils.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Target:
    """A bound on a cost, as a share of the unpruned model's.

    Targets are equal if they mean the same: ``'flops'`` is another name of ``'macs'``.

    Attributes:
        cost: A name in `COSTS`, such as ``'flops'`` (multiply-accumulates).
        ratio: The share to reach, in (0, 1).

    Examples:
        >>> Target.parse(dict(flops=0.5)).label
        'flops50'
    """

    cost: str
    ratio: float

    @classmethod
    def parse(cls, raw: Any) -> Target:
        """Read a target such as ``dict(flops=0.5)``.

        Raises:
            ConfigError: If it does not hold exactly one known cost, or if the ratio is
                outside (0, 1).
        """
        known = [name for name in COSTS.names() if COSTS[name].is_target]
        remedy = 'give one cost and a ratio, such as dict(flops=0.5)'
        if not isinstance(raw, Mapping) or len(raw) != 1:
            raise ConfigError('target', 'a dict with one cost', repr(raw), remedy)
        ((cost, ratio),) = raw.items()
        if cost not in COSTS or not COSTS[cost].is_target:
            names = ', '.join(['flops', *known])
            raise ConfigError('target', f'a cost among {names}', repr(cost), remedy)
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not is_number or not 0 < ratio < 1:
            raise ConfigError(
                f'target.{cost}', 'a ratio between 0 and 1', repr(ratio), remedy
            )
        return cls(cost, float(ratio))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and self._meaning == other._meaning

    def __hash__(self) -> int:
        return hash(self._meaning)

    @property
    def _meaning(self) -> tuple[str, float]:
        return COSTS.canonical(self.cost), self.ratio

    @property
    def label(self) -> str:
        """A short name for files, such as ``flops50``."""
        return f'{self.cost}{self.ratio * 100:g}'.replace('.', '_')

    def reached(self, now: Totals, full: Totals) -> bool:
        """Return whether the costs ``now`` are within the target."""
        return bool(now[self.cost] <= self.ratio * full[self.cost])


def parse_targets(raw: Any) -> tuple[Target, ...]:
    """Read one target such as ``dict(flops=0.5)``, or a list of them.

    Raises:
        ConfigError: If there is none, one is not valid, or two are the same or would
            be written to the same file.
    """
    targets = list(raw) if isinstance(raw, list | tuple) else [raw]
    if not targets:
        raise ConfigError(
            'target', 'at least one target', repr(raw), 'give dict(flops=0.5), say'
        )
    parsed = tuple(t if isinstance(t, Target) else Target.parse(t) for t in targets)
    for first, second in combinations(parsed, 2):
        if first == second or first.label == second.label:
            raise ConfigError(
                'target',
                'a list of targets that differ, also in the names of their files',
                f'{first.cost}={first.ratio!r} and {second.cost}={second.ratio!r}',
                'drop one of them',
            )
    return parsed


def check_reachable(
    targets: Sequence[Target],
    least: Totals,
    full: Totals,
    limits: Sequence[str] = (),
    finer: Totals | None = None,
    is_auto: bool = False,
) -> None:
    """Refuse targets below what is there when nothing more may go.

    Args:
        targets: The targets.
        least: Costs of the model with as few units in each group as may stay.
        full: Costs of the unpruned model.
        limits: Names of the options that limit what may go, but for the divisor.
        finer: What ``least`` would be with a divisor of 1; None if that is the divisor.
        is_auto: Whether the divisor is chosen by a latency profile.

    Raises:
        ConfigError: If a target cannot be reached, or means a cost of zero.
    """
    for target in reversed(targets):  # the last one is what the user is after
        if not full[target.cost]:
            raise ConfigError(
                f'target.{target.cost}',
                'of a cost that the model has',
                f'{target.ratio:g} of 0',
                'give another cost, or a batch on which the layers run',
            )
        if not target.reached(least, full):
            raise ConfigError(
                f'target.{target.cost}',
                f'at least {least_ratio(target.cost, least, full):g}, which remains '
                'when all groups are at their limit',
                f'{target.ratio:g}',
                _remedy(target, full, limits, finer, is_auto),
            )


def least_ratio(cost: str, least: Totals, full: Totals) -> float:
    """Return the least target for a cost that can be reached, to three digits.

    Args:
        cost: A name in `COSTS`.
        least: Costs of the model with as few units in each group as may stay.
        full: Costs of the unpruned model.

    Examples:
        >>> least_ratio('macs', Totals({'macs': 2001}), Totals({'macs': 4000}))
        0.501
    """
    return ceil(least.ratio(cost, full) * 1000) / 1000


def _remedy(
    target: Target,
    full: Totals,
    limits: Sequence[str],
    finer: Totals | None,
    is_auto: bool,
) -> str:
    """Return what lets more go: the options that are in the way, no others."""
    names = list(limits)
    if COSTS[target.cost].from_profile:
        # What is measured may be lower at wider groups, in whole blocks.
        names += [] if is_auto else ["divisor='auto'"]
    elif finer is not None and target.reached(finer, full):
        least = least_ratio(target.cost, finer, full)
        return f'raise it, or give a smaller divisor: divisor=1 leaves {least:g}'
    elif finer is not None:
        names.append('divisor')
    more = ', '.join(names[:-1]) + ' and ' * (len(names) > 1) + ''.join(names[-1:])
    return f'raise it, or let more go with {more}' if names else 'raise it'
