"""Models to deploy, without the branches that nothing reads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from mmengine.config import Config
from torch import nn

from mmgfp.discovery.dead import DeadBranches, find_dead_branches
from mmgfp.engine.demo_batch import demo_calls
from mmgfp.engine.deploy import Deployable
from mmgfp.surgery.compact import compact_
from mmgfp.surgery.structure import PruneStructure


def without_dead_branches(
    cfg: Config, item: Deployable
) -> tuple[Deployable, DeadBranches]:
    """Replace modules whose outputs nothing reads, with the structure that says so.

    A made-up batch tells which they are: neither its training loss, nor raw outputs,
    nor results of inference change without them.

    Args:
        cfg: The config that the checkpoint belongs to.
        item: The model to deploy, which is changed in place.

    Returns:
        tuple: The model with its new structure, and what was found; none, with a
        reason, where the model has no loss on a made-up batch.
    """
    calls = demo_calls(cfg, item.original)
    has_results: list[bool] = []

    def outputs(model: nn.Module) -> Any:
        return calls.forward(model), _results(calls.data, model, has_results)

    item.model.train()
    try:
        dead = find_dead_branches(item.model, calls.steady_loss, outputs)
    except Exception as error:  # of any kind: the model is deployed as it is
        reason = f'{type(error).__name__}: {" ".join(str(error).split())}'
        dead = DeadBranches(reasons={'the whole model': f'not looked into, {reason}'})
    item.model.eval()
    if not dead.names:
        return item, dead
    structure = item.structure
    whole = PruneStructure(
        identities=tuple(sorted({*structure.identities, *dead.names}))
    )
    left = {n for n in (*structure.kept, *structure.attributes) if not whole.is_gone(n)}
    structure = replace(
        whole,
        sizes={n: s for n, s in structure.sizes.items() if n in left},
        kept={n: k for n, k in structure.kept.items() if n in left},
        attributes={n: w for n, w in structure.attributes.items() if n in left},
    )
    compact_(item.model, PruneStructure(identities=dead.names))
    return replace(item, structure=structure), dead


def lines_of(dead: DeadBranches) -> list[str]:
    """Return lines that say what went, and what stays although it gets no gradient."""
    went = [f'nothing reads {", ".join(dead.names)}: gone'] if dead.names else []
    return went + [
        f'{module} gets no gradient, but stays: {reason}'
        for module, reason in dead.reasons.items()
    ]


def _results(data: dict[str, Any], model: nn.Module, has_any: list[bool]) -> Any:
    """Return what a model predicts; nothing where it could not at first."""
    if has_any == [False]:
        return None
    try:
        results = model(**copy.deepcopy(data), mode='predict')
    except Exception:  # as of inputs of training that inference does not take
        if has_any:
            raise
        has_any.append(False)
        return None
    has_any[:] = [True]
    return results
