"""The file in which a pruning run ends: compact weights and their structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.runner.checkpoint import weights_to_cpu
from torch import nn

from mmgfp.config import PruningConfig
from mmgfp.criteria.base import CRITERIA
from mmgfp.discovery.discover import Discovery
from mmgfp.groups import Grouping
from mmgfp.selection.costs import Totals
from mmgfp.selection.greedy import Limits
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.surgery.structure import STRUCTURE_KEY, PruneStructure
from mmgfp.utils.io import save_checkpoint
from mmgfp.utils.plain import plain
from mmgfp.version import __version__


def save_artifact(
    path: str | Path,
    model: nn.Module,
    structure: PruneStructure,
    meta: dict[str, Any],
    others: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write a compact model so that it loads with ``weights_only=True``.

    Args:
        path: The file, written whole or not at all.
        model: The compact model.
        structure: The structure that the model was cut down to.
        meta: Further entries such as ``dataset_meta``; values that are not plain become
            text.
        others: Further models of the same structure; weights of ``'source'``, say,
            go under ``'source_state_dict'``.

    Raises:
        SavingError: If the disk is full or fails.
    """
    models = {'state_dict': model}
    models |= {f'{name}_state_dict': other for name, other in (others or {}).items()}
    save_checkpoint(
        {
            'meta': plain({'mmgfp_version': __version__, **meta}),
            **{key: weights_to_cpu(m.state_dict()) for key, m in models.items()},
            STRUCTURE_KEY: structure.to_dict(),
        },
        path,
    )


def choices(
    config: PruningConfig,
    discovery: Discovery,
    kept: np.ndarray,
    importance: np.ndarray | None,
    limits: Limits,
) -> dict[str, Any]:
    """Return which channels are coupled, how many units stay, and why layers do.

    Args:
        config: Options of the run.
        discovery: The facts about the unpruned model.
        kept: Units that were not pruned, (U,).
        importance: Importance of the units at the last decision, (U,), if known. Of the
            units of a group that stay, the lowest, the median and the highest are
            given, None where nothing is known.
        limits: How far each group may shrink.
    """
    grouping, spec = discovery.grouping, config.criterion
    name = spec['type'] if isinstance(spec, Mapping) else spec
    return {
        'criterion': CRITERIA.canonical(name),
        'groups': _groups(grouping, kept, importance),
        'frozen': [asdict(layer) for layer in grouping.frozen],
        'narrow': asdict(NarrowGroups.of(limits, grouping, kept)),
        # Transposed layers have their output channels in another dimension.
        'out_dims': {n: p.out_dim for n, p in discovery.profiles.items() if p.out_dim},
    }


def _groups(
    grouping: Grouping, kept: np.ndarray, importance: np.ndarray | None
) -> list[dict[str, Any]]:
    groups = []
    for number, group in enumerate(grouping.groups):
        stay = kept & (grouping.group_of == number)
        scores = np.zeros(0) if importance is None else importance[stay]
        known = scores[~np.isnan(scores)]
        groups.append(
            {
                'name': group.name,
                'units': group.units,
                'remaining': int(stay.sum()),
                'members': [[m.name, m.dim, m.role] for m in group.members],
                'importance': np.quantile(known, (0, 0.5, 1)) if len(known) else None,
            }
        )
    return groups


def weight_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the shapes of the layers of an unpruned model, in its order.

    A file that names them tells the widths of layers in modules that are gone whole.

    Args:
        shapes: Shapes of all tensors by name.
    """
    weights = {n: [*s] for n, s in shapes.items() if n.endswith('.weight')}
    return {'shapes': {n: shape for n, shape in weights.items() if len(shape) > 1}}


def circumstances(config: PruningConfig) -> dict[str, Any]:
    """Return what the costs of a run are for: an image size, and a runtime if any."""
    profile = config.profile
    runtime = {} if profile is None else {'latency_profile': profile.runtime}
    return {'input_shape': config.input_shape, **runtime}


def costs_in_numbers(now: Totals, full: Totals) -> dict[str, dict[str, float]]:
    """Return the remaining costs and their share of the full ones, in plain numbers.

    Args:
        now: Costs of the model as it is pruned so far.
        full: Costs of the unpruned model.
    """
    return {
        cost: {'remaining': now[cost], 'ratio': now.ratio(cost, full)}
        for cost in now.values
    }
