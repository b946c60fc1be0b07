"""How far the groups of a model may shrink, and what is left of it then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgfp.config import PruningConfig
from mmgfp.selection.costs import Totals
from mmgfp.selection.greedy import Limits
from mmgfp.selection.latency import choose_divisor
from mmgfp.selection.scope import group_shares
from mmgfp.selection.targets import Target, check_reachable

if TYPE_CHECKING:  # which asks for its limits
    from mmgfp.units import UnitState


def limits_of(units: UnitState, config: PruningConfig) -> Limits:
    """Return how far each group may shrink.

    Args:
        units: All units of the model.
        config: The options of the run.

    Raises:
        ConfigError: If ratios are of other groups.
    """
    divisor: Any = config.divisor
    if config.profile is not None:
        divisor = choose_divisor(divisor, units.costs, units.sizes, units.widths)
    groups, blocks = units.grouping.groups, units.grouping.blocks
    shares = group_shares(config.scope, config.ratios, [g.name for g in groups])
    options = (config.min_channels, config.max_ratio, divisor, shares)
    sizes, widths = units.sizes[: len(groups)], units.widths[: len(groups)]
    inside = [units.grouping.groups_inside(block) for block in blocks]
    return Limits.of(sizes, widths, *options).with_blocks(inside)


def least_costs(
    units: UnitState, limits: Limits, kept: np.ndarray | None = None
) -> Totals:
    """Return the costs of the smallest model that limits allow.

    Args:
        units: All units of the model.
        limits: How far each group may shrink.
        kept: Units that are left so far, (U,); all if None.
    """
    group_of = units.group_of if kept is None else units.group_of[kept]
    left = np.bincount(group_of, minlength=len(units.sizes))
    return units.costs.totals(units.sizes - limits.smallest(left))


def check_targets(
    units: UnitState,
    targets: Sequence[Target],
    limits: Limits,
    config: PruningConfig,
    kept: np.ndarray | None = None,
) -> None:
    """Refuse targets that the limits do not let a model reach.

    Args:
        units: All units of the model.
        targets: The targets.
        limits: How far each group may shrink.
        config: The options that they are by.
        kept: Units that are left so far, (U,); all if None.

    Raises:
        ConfigError: If a target cannot be reached.
    """
    least, finer = least_costs(units, limits, kept), None
    if limits.divisor > 1:
        any_width = replace(limits, steps=np.ones_like(limits.steps))
        finer = least_costs(units, any_width, kept)
    is_auto = config.divisor == 'auto'
    check_reachable(targets, least, units.full, config.limiting, finer, is_auto)
