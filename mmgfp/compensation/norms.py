"""Statistics of batch norms, taken anew from the model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mmgfp.compensation.recording import Call, run_until


def renew_norms(
    model: nn.Module,
    calls: Sequence[Call],
    norms: Mapping[str, nn.Module],
    counts: Mapping[str, int],
) -> None:
    """Set running statistics of batch norms to their average over some batches.

    Every other module, and norms not named, stay in eval mode. A norm that is kept from
    training, as `norm_eval` does, gets new statistics all the same, as they belong to
    the channels that it had, and is frozen again.

    Args:
        model: The model, in eval mode.
        calls: Run a model on one batch each.
        norms: The norms, by name.
        counts: How often each is called in a forward pass.
    """
    if not norms:
        return
    calls_of = {name: counts[name] for name in norms}
    with _averaging(norms):
        for call in calls:
            run_until(model, call, norms, calls_of, lambda name, x, y: None)


@contextmanager
def _averaging(norms: Mapping[str, Any]) -> Iterator[None]:
    """Let norms average statistics over all batches that they see."""
    before = [(n, n.momentum, n.training) for n in norms.values()]
    for norm in norms.values():
        norm.reset_running_stats()
        # A cumulative average, so that every batch counts alike.
        norm.momentum, norm.training = None, True
    try:
        yield
    finally:
        for norm, momentum, training in before:
            norm.momentum, norm.training = momentum, training
