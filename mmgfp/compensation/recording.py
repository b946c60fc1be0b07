"""Runs of a model in which the calls of some of its modules are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.tracing.rows import layer_input
from mmgfp.utils.trial_runs import random_states_restored

#: Runs a module on one batch, always the same, and returns what it gives; the loss, a
#: scalar, where gradients are asked for.
Call = Callable[[nn.Module], Any]
#: Takes the input and the output of a call of a module.
Seen = Callable[[Tensor, Tensor], None]


class _EnoughSeen(BaseException):
    """Ends a forward pass. Not an `Exception`, which a model may catch."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model into eval mode for a while."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            # Not `train()`, which some models override to keep parts in eval mode.
            module.training = training


@contextmanager
def watch(
    modules: Mapping[str, nn.Module], seen: Callable[..., None]
) -> Iterator[None]:
    """Call ``seen(name, x, y)`` with input and output of each call of some modules."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            x = layer_input(args, kwargs)
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                seen(name, x, y)

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_until(
    model: nn.Module,
    call: Call,
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, int],
    seen: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run a model forward until some of its modules were called often enough.

    Args:
        model: The model.
        call: Runs it on a batch.
        modules: Modules to watch, by name.
        calls: How often each is called.
        seen: Called with the name, the input and the output of a call.
    """
    missing = dict(calls)

    def count(name: str, x: Tensor, y: Tensor) -> None:
        seen(name, x, y)
        missing[name] -= 1
        if missing[name] <= 0:
            del missing[name]
        if not missing:  # what comes after is of no use
            raise _EnoughSeen

    watched = watch(modules, count)
    with random_states_restored(model), watched, suppress(_EnoughSeen):
        call(model)
