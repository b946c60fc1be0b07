"""Decisions in which pruned units may come back: pure functions.

A decision first takes what it would take for good. That says how far costs go down, so
any schedule keeps its pace. Then all units compete for the places that this leaves:
those that were pruned as well as those that were kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmgfp.selection.costs import CostTable, Totals
from mmgfp.selection.greedy import Limits, select_units
from mmgfp.selection.schedules import DecisionPoint, Schedule
from mmgfp.selection.targets import Target
from mmgfp.utils.errors import ConfigError

#: What options must be beside `recover`, and what to change otherwise.
REFUSED = {
    'criterion': (
        'one that scores pruned units, where recover is True',
        "use 'fisher', 'taylor' of gates or one of weights, or drop recover",
    ),
    'compact_interval': (
        'None where recover is True, as units that are cut out cannot come back',
        'drop one of them',
    ),
    'blocks': (
        'False where recover is True, as units of a block that is gone could not come'
        ' back alone',
        'drop one of them',
    ),
    'compensate': (
        "'none' where recover is True, as weights kept aside are of layers as they were"
        ' before they were refitted',
        'drop one of them',
    ),
}


def check_recovery(
    schedule: Schedule, targets: Sequence[Target], refused: Mapping[str, object]
) -> None:
    """Refuse options of a run that leave pruned units no way back.

    Args:
        schedule: The schedule of the run.
        targets: All targets.
        refused: Values of options that do not go with it, by their names in `REFUSED`;
            None for those that do.

    Raises:
        ConfigError: If there is such an option, or a single decision.
    """
    for field, value in refused.items():
        if value is not None:
            expected, remedy = REFUSED[field]
            raise ConfigError(field, expected, repr(value), remedy)
    if schedule.at_once and len(targets) == 1:
        raise ConfigError(
            'schedule',
            'one of several decisions where recover is True',
            'one_shot with one target',
            'give it several targets, use another schedule, or drop recover',
        )


def kept_after(
    gone: np.ndarray,
    point: DecisionPoint,
    group_of: np.ndarray,
    costs: CostTable,
    limits: Limits,
    normalize: str,
) -> np.ndarray:
    """Return the units that stay when pruned ones may come back, (U,).

    From the model with all units, those with the least importance per cost go until
    the costs of all pending targets are as low as without returns. They are lower after
    each decision than before it, so runs end. In a decision that reaches a target
    nothing returns.

    Args:
        gone: Numbers of the units that the decision takes without returns, (V,).
        point: The state of the run, with the importance of all units: of pruned ones
            what they would be worth, NaN where that is not known and they stay pruned.
        group_of: Group of each unit, ascending, (U,).
        costs: The model's costs.
        limits: How far each group may shrink.
        normalize: A name in `COSTS`, or ``'none'``.
    """
    without = point.kept.copy()
    without[gone] = False
    may_return = ~point.kept & ~np.isnan(point.importance)
    names = [target.cost for target in point.pending]
    bound = costs.totals(_removed(without, group_of, limits))
    # What is saved at a target has no units that were not trained since.
    is_saved = any(target.reached(bound, point.full) for target in point.pending)
    # Of units that cost nothing, as many must go as would without returns.
    is_free = all(bound[n] >= point.now[n] for n in names)
    if not may_return.any() or is_saved or is_free:
        return without

    def is_met(now: Totals) -> bool:
        return all(now[name] <= bound[name] for name in names)

    pool = point.kept | may_return
    choice = (point.importance, group_of, pool, costs, limits, normalize)
    kept = pool.copy()
    kept[select_units(*choice, is_met)] = False
    # Groups in blocks may leave no way there from all units.
    is_low = is_met(costs.totals(_removed(kept, group_of, limits)))
    return kept if is_low else without


def _removed(kept: np.ndarray, group_of: np.ndarray, limits: Limits) -> np.ndarray:
    """Return the units that are gone from each group, (G,)."""
    return np.bincount(group_of[~kept], minlength=len(limits.least))
