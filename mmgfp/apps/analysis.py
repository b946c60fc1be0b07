"""Costs of a model and the share of it that pruning can reach."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from mmgfp.config import PruningConfig
from mmgfp.engine.artifact import costs_in_numbers
from mmgfp.groups import Grouping, module_of
from mmgfp.selection.costs import COSTS, CostTable, LayerProfile, Totals
from mmgfp.selection.greedy import Limits
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.selection.targets import least_ratio
from mmgfp.unit_limits import check_targets, least_costs
from mmgfp.units import UnitState
from mmgfp.utils.errors import ConfigError


def costs_of(model: nn.Module, profiles: dict[str, LayerProfile]) -> dict[str, int]:
    """Count all costs of a model for one image, by their names in `COSTS`.

    Args:
        model: Any module.
        profiles: Profiles of its layers for that image, by the name of the weight.

    Examples:
        A 3x3 convolution from 3 to 8 channels, with a bias, on 32x32 pixels:

        >>> import torch
        >>> from mmgfp.discovery.profile import profile_layers
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        >>> image = torch.zeros(1, 3, 32, 32)
        >>> costs_of(model, profile_layers(model, lambda m: m(image), 1))
        {'macs': 221184, 'memory': 8192, 'params': 224}
    """
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    totals = CostTable(shapes, profiles, ()).totals(np.zeros(0))
    return {cost: int(value) for cost, value in totals.values.items()}


def counted_costs(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return what `costs_of` counted of two models as the file of a pruned one has it.

    Args:
        before: Costs of the original model, maybe among other things.
        after: Likewise, of the pruned one.

    Examples:
        >>> counted_costs({'macs': 8, 'latency_ms': 3}, {'macs': 2, 'latency_ms': 1})
        {'macs': {'remaining': 2, 'ratio': 0.25}}
    """
    names = [name for name in COSTS.names() if name in after]
    now, full = (Totals({n: row[n] for n in names}) for row in (after, before))
    return costs_in_numbers(now, full)


def without_predictions(costs: Mapping[str, Any]) -> dict[str, Any]:
    """Return costs of a pruned model's file without what a profile predicted.

    It holds for the model and the image size of the pruning run only.

    Args:
        costs: What `costs_in_numbers` returned there.

    Examples:
        >>> without_predictions({'macs': {'ratio': 0.5}, 'latency': {'ratio': 0.6}})
        {'macs': {'ratio': 0.5}}
    """
    return {n: v for n, v in costs.items() if not is_predicted(n)}


def is_predicted(cost: str) -> bool:
    """Return whether a cost is one that a profile predicts."""
    return cost in COSTS and COSTS[cost].from_profile


def coverage(
    model: nn.Module, grouping: Grouping, profiles: dict[str, LayerProfile]
) -> dict[str, float]:
    """Return the shares of a model that pruning can reach, each between 0 and 1.

    Returns:
        dict: ``channels``, the share of the layers' output channels that some unit can
        remove; ``macs``, the share of the MACs that layers with a prunable input or
        output side do.
    """
    parameters = dict(model.named_parameters())
    frozen = {f.layer: f.channels for f in grouping.frozen}
    channels = removable = 0
    for name, layer in profiles.items():
        width = parameters[name].shape[layer.out_dim]
        channels += width
        removable += width - frozen.get(module_of(name), 0)
    # A layer that keeps its own outputs still gets cheaper when its inputs go.
    touched = {
        member.name
        for group in grouping.groups
        for member in group.members
        if member.is_input or member.is_output
    } | {name for name, units in grouping.inputs.items() if (units >= 0).any()}
    macs = {n: w.macs_positions * parameters[n].numel() for n, w in profiles.items()}
    reached = sum(value for name, value in macs.items() if name in touched)
    return {
        'channels': removable / max(channels, 1),
        'macs': reached / max(sum(macs.values()), 1),
    }


def report(
    units: UnitState,
    profiles: dict[str, LayerProfile],
    options: PruningConfig,
    is_asked: bool,
    unread: Collection[str] = (),
) -> dict[str, Any]:
    """Report costs, groups, what stays and coverage of a model.

    Args:
        units: All units of the model.
        profiles: How often its layers use their weights.
        options: How the model is to be pruned, with the latency profile of ``units``.
        is_asked: Whether somebody has asked for the targets of the options.
        unread: Names of parameters that the loss does not depend on; groups of no
            others are never scored, so that they stay.

    Raises:
        ConfigError: If ratios are of other groups.
    """
    # Without targets, as what can be pruned is of interest even if it's not enough.
    limits = units.limits(options, ())
    narrow = NarrowGroups.of(limits, units.grouping)
    unscored = _groups_within(unread, units)
    limits = replace(limits, least=np.where(unscored, units.sizes, limits.least))
    refused = _refusal(units, limits, options) if is_asked else ''
    blocks = [block.name for block in units.grouping.blocks]
    return {
        **_costs(units, options),
        'groups': [
            {
                'name': group.name,
                'units': group.units,
                'members': [[m.name, m.dim] for m in group.members],
            }
            for group in units.grouping.groups
        ],
        'frozen': [
            {'layer': f.layer, 'reason': f.reason} for f in units.grouping.frozen
        ],
        'narrow': asdict(narrow),
        'unscored': [units.grouping.names[g] for g in np.flatnonzero(unscored)],
        'least': _least(units, limits),
        'limited_by': [*options.limiting, f'divisor={limits.divisor}'],
        **({'refused': refused} if refused else {}),
        **({'blocks': blocks} if blocks else {}),
        'coverage': coverage(units.model, units.grouping, profiles),
    }


def _costs(units: UnitState, options: PruningConfig) -> dict[str, Any]:
    costs: dict[str, Any] = {n: int(value) for n, value in units.full.values.items()}
    if options.profile is not None:
        runtime = options.profile.runtime
        costs |= {'latency': units.full['latency'], 'latency_profile': runtime}
    return costs


def _least(units: UnitState, limits: Limits) -> dict[str, float]:
    """Return the shares of costs that remain; of a measured time, less may."""
    least, full = least_costs(units, limits), units.full
    names = [name for name in full.values if not is_predicted(name)]
    return {name: least_ratio(name, least, full) for name in names}


def _groups_within(names: Collection[str], units: UnitState) -> np.ndarray:
    """Return which groups, (G,), have no parameters but those of some names."""
    parameters = {name for name, _ in units.model.named_parameters()}
    members = [
        {m.name for m in group.members} & parameters for group in units.grouping.groups
    ]
    blocks = [False] * len(units.grouping.blocks)
    return np.array([found <= {*names} for found in members] + blocks, dtype=bool)


def _refusal(units: UnitState, limits: Limits, options: PruningConfig) -> str:
    """Return why a run would refuse its targets; empty if it would not."""
    try:
        check_targets(units, options.targets, limits, options)
    except ConfigError as error:
        return str(error)
    return ''
