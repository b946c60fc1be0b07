"""What a model loses where a share of one group of channels is pruned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mmgfp.apps.json_lines import append_line, read_lines
from mmgfp.criteria.base import Criterion, ScoringContext
from mmgfp.discovery.discover import Discovery
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.selection.greedy import Limits
from mmgfp.selection.targets import Target
from mmgfp.units import UnitState
from mmgfp.utils.errors import ConfigError

#: Loss of the metric by group number and share.
Losses = dict[int, dict[float, float]]
#: Number and share of the line about the model as it is.
AS_IT_IS = (-1, 0.0)


@dataclass(frozen=True)
class Scan:
    """Losses of a model where a share of one group is masked.

    Attributes:
        metric: The metric's name.
        full: Its value for the model as it is.
        losses: What it loses, by group number and share.
    """

    metric: str
    full: float
    losses: Losses


def score_units(
    model: nn.Module,
    discovery: Discovery,
    criterion: Criterion,
    batches: Iterable[BatchCalls],
) -> np.ndarray:
    """Return the importance of all units by some training batches, (U,).

    Args:
        model: The model, which computes its loss in training mode and is left as it is.
        discovery: Its groups.
        criterion: Scores them.
        batches: The batches; the optimizer makes no step between them.
    """
    grouping = discovery.grouping
    everything = np.ones(grouping.units, dtype=bool)
    units = (np.flatnonzero(everything), grouping.group_of)
    context = ScoringContext(model, grouping, *units, discovery.rows, everything)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    criterion.attach(context)
    try:
        for batch in batches:
            criterion.watch(True)
            model.train()
            model.zero_grad()
            batch.loss(model).backward()
            criterion.update()
        return criterion.scores().values
    finally:
        criterion.detach()
        model.zero_grad()
        model.load_state_dict(weights)  # batch norms have seen the batches


def lowest_units(
    scores: np.ndarray, group_of: np.ndarray, group: int, share: float
) -> np.ndarray | None:
    """Return the lowest-scored units of a group that make up a share of it, (V,).

    One unit stays in any case. Units without a finite score never go.

    Returns:
        None if fewer units of the group have a finite score.

    Examples:
        >>> scores = np.array([0.0, 3, 1, 2, np.nan])
        >>> group_of = np.array([0, 1, 1, 1, 1])
        >>> lowest_units(scores, group_of, 1, 0.5)
        array([2, 3])
        >>> lowest_units(scores, group_of, 1, 1.0)
        array([2, 3, 1])
    """
    numbers = np.flatnonzero(group_of == group)
    count = min(removed_by(share, len(numbers)), len(numbers) - 1)
    known = numbers[np.isfinite(scores[numbers])]
    if len(known) < count:
        return None
    return known[np.argsort(scores[known], kind='stable')][:count]


def removed_by(share: float, units: int) -> int:
    """Return how many units a share of them is, rounded down.

    Examples:
        >>> removed_by(0.29, 100)  # 0.29 * 100 is 28.999999999999996
        29
    """
    return int(share * units + 1e-9)


def scan(
    units: UnitState,
    scores: np.ndarray,
    shares: Sequence[float],
    evaluate: Callable[[], tuple[str, float]],
    path: Path,
) -> Scan:
    """Measure a metric with a share of each group masked, one group at a time.

    Args:
        units: The units of the model, none of them pruned.
        scores: Their importance, (U,); groups with too few scores are left out.
        shares: The shares.
        evaluate: Returns the metric's name and its value for the model as it is.
        path: A file with a line for each group and share; what it holds is not measured
            again.
    """
    known = {(line['number'], line['share']): line for line in read_lines(path)}
    if AS_IT_IS not in known:
        name, metric = evaluate()
        line = dict(number=-1, group=name, share=0.0, units=0, metric=metric)
        append_line(path, line)
        known[AS_IT_IS] = line
    name, full = known[AS_IT_IS]['group'], known[AS_IT_IS]['metric']
    print(f'{name} of the model as it is: {full:.2f}', flush=True)
    groups = units.grouping.groups
    pairs = [(g, share) for g in range(len(groups)) for share in shares]
    todo = [pair for pair in pairs if pair not in known]
    weights = {n: t.clone() for n, t in units.model.state_dict().items()}
    began = time.monotonic()
    for number, (g, share) in enumerate(todo, 1):
        gone = lowest_units(scores, units.group_of, g, share)
        if gone is None:
            print(f'{groups[g].name}: too few units have a score for {share:g}')
            continue
        metric = full
        if len(gone):
            with _masked(units, gone, weights):
                metric = evaluate()[1]
        line = dict(number=g, group=groups[g].name, share=share)
        known[g, share] = {**line, 'units': len(gone), 'metric': metric}
        append_line(path, known[g, share])
        minutes = (time.monotonic() - began) / number * (len(todo) - number) / 60
        what = f'{groups[g].name} without {len(gone)} of {groups[g].units}'
        numbers = f'{metric:.2f} ({metric - full:+.2f}), {minutes:.0f} min left'
        print(f'{number} of {len(todo)}: {what}: {numbers}', flush=True)
    losses: Losses = {}
    for g, share in (pair for pair in pairs if pair in known):
        losses.setdefault(g, {})[share] = full - known[g, share]['metric']
    return Scan(name, full, losses)


@contextmanager
def _masked(
    units: UnitState, gone: np.ndarray, weights: Mapping[str, Any]
) -> Iterator[None]:
    """Mask units, then give them back to the model, with their weights."""
    units.prune(gone)
    try:
        yield
    finally:
        units.kept[:] = True
        for mask in units.masks:
            mask.update(units.kept)
        units.model.load_state_dict(weights)


def tolerable_shares(losses: Losses, groups: int, tolerance: float) -> np.ndarray:
    """Return the largest share of each group that costs at most ``tolerance``, (G,).

    Examples:
        >>> losses = {0: {0.25: 0.1, 0.5: 0.4, 0.75: 5.0}, 2: {0.25: -0.1}}
        >>> tolerable_shares(losses, 3, 0.4).tolist()
        [0.5, 0.0, 0.25]
    """
    shares = np.zeros(groups)
    for g, by_share in losses.items():
        shares[g] = max((s for s, x in by_share.items() if x <= tolerance), default=0.0)
    return shares


def scale_to_target(
    shares: np.ndarray, units: UnitState, limits: Limits, target: Target
) -> np.ndarray:
    """Scale shares by one factor until a target is met, (G,).

    Args:
        shares: The share of each group that may go, (G,).
        units: The units of the model, none of them pruned.
        limits: How far each group may shrink, and at multiples of what.
        target: The target.

    Returns:
        Shares that are whole numbers of units, with which each group comes to rest.

    Raises:
        ConfigError: If the target cannot be met by pruning these groups alone.
    """
    sizes, smallest = units.sizes, limits.smallest(units.sizes)

    def removed(scale: float) -> np.ndarray:
        wanted = sizes - np.floor(shares * scale * sizes + 1e-9)
        kept = np.ceil(wanted / limits.steps) * limits.steps
        return sizes - np.clip(kept, smallest, sizes)

    def is_met(scale: float) -> bool:
        return target.reached(units.costs.totals(removed(scale)), units.full)

    low, high = 0.0, float(1 / shares[shares > 0].min()) if shares.any() else 0.0
    if not is_met(high):
        ratio = units.costs.totals(removed(high)).ratio(target.cost, units.full)
        raise ConfigError(
            f'--target {target.cost}',
            f'at least {np.ceil(ratio * 1000) / 1000:g}, which remains when all groups '
            'that lose at most --tolerance at some share are at their limit',
            f'{target.ratio:g}',
            "raise it or --tolerance, scan smaller --shares, or lower the hook's "
            'divisor',
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return removed(high) / sizes


def ratios_by_name(shares: np.ndarray, units: UnitState) -> dict[str, float]:
    """Return the share of each group by its name; the smallest of those of one name."""
    ratios: dict[str, float] = {}
    for group, share in zip(units.grouping.groups, shares, strict=True):
        ratios[group.name] = min(float(share), ratios.get(group.name, 1.0))
    return ratios
