"""What can be pruned of a model, and what it costs: numbers for people and tools."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from mmgfp.groups import Grouping, module_of
from mmgfp.pruner import GroupFisherPruner
from mmgfp.selection.costs import CostTable, LayerProfile


def costs_of(model: nn.Module, profiles: dict[str, LayerProfile]) -> dict[str, int]:
    """``macs``, ``memory`` and ``params`` of a model for one image.

    Args:
        model: Any module.
        profiles: What its layers work on.
    """
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    totals = CostTable(shapes, profiles, ()).totals(np.zeros(0))
    return {cost: int(value) for cost, value in totals.values.items()}


def coverage(
    model: nn.Module, grouping: Grouping, profiles: dict[str, LayerProfile]
) -> dict[str, float]:
    """Shares of a model that pruning can reach.

    Returns:
        dict: ``channels``, the output channels of layers that some unit can remove of
        all of them; ``macs``, the MACs of layers with a prunable input or output side
        of all MACs.
    """
    parameters = dict(model.named_parameters())
    frozen = {f.layer: f.channels for f in grouping.frozen}
    channels = removable = 0
    for name, layer in profiles.items():
        width = parameters[name].shape[layer.out_dim]
        channels += width
        removable += width - frozen.get(module_of(name), 0)
    touched = {
        member.name
        for group in grouping.groups
        for member in group.members
        if member.role in ('in', 'out')
    } | {name for name, units in grouping.inputs.items() if (units >= 0).any()}
    macs = {n: w.macs_positions * parameters[n].numel() for n, w in profiles.items()}
    reached = sum(value for name, value in macs.items() if name in touched)
    return {
        'channels': removable / max(channels, 1),
        'macs': reached / max(sum(macs.values()), 1),
    }


def report(
    pruner: GroupFisherPruner, profiles: dict[str, LayerProfile]
) -> dict[str, Any]:
    """Costs, groups, frozen layers and coverage of a prepared pruner, as plain data."""
    full = pruner.units.full
    return {
        'macs': int(full['macs']),
        'params': int(full['params']),
        'memory': int(full['memory']),
        'groups': [
            {
                'name': group.name,
                'units': group.units,
                'members': [[m.name, m.dim] for m in group.members],
            }
            for group in pruner.units.grouping.groups
        ],
        'frozen': [
            {'layer': f.layer, 'reason': f.reason} for f in pruner.units.grouping.frozen
        ],
        'coverage': coverage(pruner.model, pruner.units.grouping, profiles),
    }
