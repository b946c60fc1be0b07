"""What pruning without training made of a model: its files, tables and lines."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmengine.config import Config

from mmgfp.apps.analysis import counted_costs, without_predictions
from mmgfp.apps.tables import size_cells
from mmgfp.config import PruningConfig
from mmgfp.discovery.dead import DeadBranches
from mmgfp.engine.artifact import choices, circumstances, costs_in_numbers
from mmgfp.engine.deploy import Deployable, Trained
from mmgfp.rounds import Pruned
from mmgfp.selection.costs import COSTS
from mmgfp.selection.narrow import NarrowGroups


@dataclass(frozen=True)
class Outcome:
    """A model that was pruned, and what it was before.

    Attributes:
        original: The model before.
        pruned: The result.
        options: The options of pruning.
        shape: Size (C, H, W) of the image that costs are counted for.
        rows: For the original and the pruned model, the name, costs, and the metric
            where there are images to test on.
        metric: The metric's name, None if nothing was tested.
        seconds: How long pruning took, without tests.
        dead: What went because nothing reads it.
    """

    original: Trained
    pruned: Pruned
    options: PruningConfig
    shape: Sequence[int]
    rows: list[dict[str, Any]]
    metric: str | None
    seconds: float
    dead: DeadBranches


def deployable(cfg: Config, outcome: Outcome) -> Deployable:
    """Return the pruned model with all that its files say of it.

    Args:
        cfg: The config of the unpruned model.
        outcome: The result.
    """
    pruned, options, original = outcome.pruned, outcome.options, outcome.original
    facts = (pruned.discovery, pruned.kept, pruned.importance, pruned.limits)
    costs = costs_in_numbers(pruned.totals, pruned.full)
    if outcome.dead.names:
        costs = without_predictions(costs)
    meta = {
        **{k: v for k, v in original.meta.items() if k == 'dataset_meta'},
        # Of the model as it is written, without what nothing reads.
        'costs': costs | counted_costs(*outcome.rows),
        **circumstances(options),
        **choices(options, *facts),
        'input_shape': list(outcome.shape),
    }
    architecture = copy.deepcopy(cfg.model.to_dict())
    parts = (pruned.structure, original.model, pruned.model, meta)
    return Deployable(architecture, *parts)


def cells(outcome: Outcome) -> list[list[str]]:
    """Return the table: a header, the original and the pruned model."""
    header, sizes = size_cells(outcome.rows)
    table = [['model', *([outcome.metric] if outcome.metric else []), *header]]
    for row, size in zip(outcome.rows, sizes, strict=True):
        metric = [f'{row["metric"]:.1f}'] if outcome.metric else []
        table.append([row['model'], *metric, *size])
    return table


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return all that is known of a result, in plain types for JSON."""
    return {
        'rows': outcome.rows,
        'metric': outcome.metric,
        'input_shape': list(outcome.shape),
        'seconds': outcome.seconds,
        'rounds': [
            {
                'target': {r.target.cost: r.target.ratio},
                'units': len(r.units),
                'layers': [asdict(layer) for layer in r.layers],
                'norms': list(r.norms),
            }
            for r in outcome.pruned.rounds
        ],
    }


def beyond_target(outcome: Outcome) -> str:
    """Return a line on why clearly less is left than was asked for, or nothing."""
    (target,), pruned = outcome.options.targets, outcome.pruned
    cost = COSTS.canonical(target.cost)
    full, now = (row.get(cost) for row in outcome.rows)
    if not full or now / full > target.ratio - 0.01:
        return ''
    cut, divisor = pruned.rounds[-1].share, pruned.limits.divisor
    reasons = []
    if cut < target.ratio - 0.005 and divisor > 1:
        reasons.append(f'widths come to rest at multiples of {divisor} (--divisor)')
    if outcome.dead.names and now / full < cut - 0.005:
        reasons.append('what nothing reads went after the last cut')
    why = f': {" and ".join(reasons)}' if reasons else ''
    return (
        f'{now / full:.1%} of {target.cost} are left, {target.ratio * 100:g}% were '
        f'asked for; the last cut ended at {cut:.1%}{why}'
    )


def left_alone(outcome: Outcome) -> list[str]:
    """Return a line for each reason why something stayed as it was.

    Groups may be too narrow to be pruned; layers, not be refitted in the last cut.
    """
    pruned = outcome.pruned
    grouping = pruned.discovery.grouping
    members = {g.name: [m.name for m in g.members] for g in grouping.groups}
    narrow = NarrowGroups.of(pruned.limits, grouping)
    narrow = narrow.left_in(pruned.structure, members)
    layers = pruned.rounds[-1].layers
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    return ([narrow.text] if narrow.text else []) + [
        f'{count} of {len(layers)} layers keep their weights: {why}'
        for why, count in reasons.most_common()
    ]
