"""The file in which a pruning run ends: compact weights and their structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.runner.checkpoint import weights_to_cpu
from torch import nn

from mmgfp.config import PruningConfig
from mmgfp.selection.costs import Totals
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
