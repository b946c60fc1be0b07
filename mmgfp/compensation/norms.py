"""Statistics of batch norms, moved as far as a cut has moved what they read.

Running statistics of a trained model need not be those of the images at hand: frozen
ones are of other data, others of weights that training has since moved on. What a norm
makes of its inputs is what the model has learnt to read. So statistics are not taken
anew, but moved so that what norms put out keeps mean and spread: with r the ratio of
``Var[x'] + eps`` to ``Var[x] + eps``, x and x' being inputs in the original and in the
compact model, ``var' = r var`` and ``mean' = E[x'] - sqrt(r) (E[x] - mean)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.compensation.recording import Call, run_until
from mmgfp.compensation.survey import Norm
from mmgfp.tracing.rows import layer_input

#: Mean and variance of a batch, by channel, (C,).
Statistics = tuple[Tensor, Tensor]


def move_norms(
    model: nn.Module, small: nn.Module, calls: Sequence[Call], norms: Sequence[Norm]
) -> None:
    """Move running statistics of batch norms as far as their inputs have moved.

    Batches count alike. While a batch runs, norms have the statistics that are due for
    it alone, so that those behind them read what they will.

    Args:
        model: The original model, in eval mode.
        small: The compact one, in eval mode.
        calls: Run a model on one batch each.
        norms: The norms, frozen ones as well.
    """
    if not norms:
        return
    counts = {norm.name: norm.calls for norm in norms}
    moving = {norm.name: _Moving(norm) for norm in norms}
    with _before_each_call({n: m.take for n, m in moving.items()}, norms):
        for call in calls:
            for norm in moving.values():
                norm.begin()

            def seen(name: str, x: Tensor, y: Tensor) -> None:
                moving[name].originals.append(statistics(x))

            run_until(model, call, {n.name: n.original for n in norms}, counts, seen)
            modules = {norm.name: norm.small for norm in norms}
            run_until(small, call, modules, counts, lambda name, x, y: None)
    for norm in moving.values():
        norm.finish()


def statistics(x: Tensor) -> Statistics:
    """Return mean and variance by channel of (N, C, ...), in double precision."""
    dims = [d for d in range(x.dim()) if d != 1]
    # Half precision would round means, and variances could overflow.
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dims, correction=0)
    return mean.double(), var.double()


class _Moving:
    """A norm whose statistics are moving.

    Args:
        norm: The norm.

    Attributes:
        originals: Statistics of what the original reads, one for each call on a batch.
    """

    def __init__(self, norm: Norm) -> None:
        self._norm: Any = norm.small
        self._kept = norm.kept
        original: Any = norm.original
        before = original.running_mean.double(), original.running_var.double()
        self._before = self._of_small(before)
        self._sums: list[Tensor] = []
        self._count = 0
        self.originals: list[Statistics] = []

    def begin(self) -> None:
        """Begin a batch."""
        self.originals = []

    def take(self, x: Tensor) -> None:
        """Take in a call of the compact model, and set what is due for it."""
        if not self.originals:  # called more often than in the original
            return
        parts = [*self._of_small(self.originals.pop(0)), *statistics(x)]
        sums = self._sums or [torch.zeros_like(part) for part in parts]
        self._sums = [total + part for total, part in zip(sums, parts, strict=True)]
        self._count += 1
        self._set(parts)

    def _of_small(self, old: Statistics) -> Statistics:
        """Return statistics of the channels that are left."""
        return old if self._kept is None else (old[0][self._kept], old[1][self._kept])

    def finish(self) -> None:
        """Set the statistics that are due for all batches."""
        self._set(
            [total / self._count for total in self._sums] if self._count else None
        )

    @torch.no_grad()
    def _set(self, parts: Sequence[Tensor] | None) -> None:
        mean, var = self._before
        if parts is not None:
            old_mean, old_var, new_mean, new_var = parts
            ratio = (new_var + self._norm.eps) / (old_var + self._norm.eps)
            mean = new_mean - ratio.sqrt() * (old_mean - mean)
            var = ratio * var
        self._norm.running_mean.copy_(mean)
        self._norm.running_var.copy_(var)


@contextmanager
def _before_each_call(
    takes: dict[str, Callable[[Tensor], None]], norms: Sequence[Norm]
) -> Iterator[None]:
    """Hand what norms of the compact model are about to read to who takes it."""

    def hook_of(take: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = layer_input(args, kwargs)
            if isinstance(x, Tensor):
                take(x)

        return hook

    handles = [
        n.small.register_forward_pre_hook(hook_of(takes[n.name]), with_kwargs=True)
        for n in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
