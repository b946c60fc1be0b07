"""Statistics of batch norms, taken anew from the model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mmgfp.compensation.recording import Call, run_until
from mmgfp.compensation.survey import Norm


def renew_norms(
    model: nn.Module,
    calls: Sequence[Call],
    norms: Sequence[Norm],
) -> None:
    """Set running statistics of batch norms to their average over some batches.

    Every other module, and norms not named, stay in eval mode. A norm that is kept from
    training, as `norm_eval` does, gets new statistics all the same, as they belong to
    the channels that it had, and is frozen again.

    Args:
        model: The model, in eval mode.
        calls: Run a model on one batch each.
        norms: The norms.
    """
    if not norms:
        return
    modules = {norm.name: norm.small for norm in norms}
    counts = {norm.name: norm.calls for norm in norms}
    with _averaging([norm.small for norm in norms]):
        for call in calls:
            run_until(model, call, modules, counts, lambda name, x, y: None)


@contextmanager
def _averaging(norms: Sequence[Any]) -> Iterator[None]:
    """Let norms average statistics over all batches that they see."""
    before = [(n, n.momentum, n.training) for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        # A cumulative average, so that every batch counts alike.
        norm.momentum, norm.training = None, True
    try:
        yield
    finally:
        for norm, momentum, training in before:
            norm.momentum, norm.training = momentum, training
