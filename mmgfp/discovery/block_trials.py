"""Trials of modules: which ones return their input once a part of them is at zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.discovery.probing import error_line
from mmgfp.utils.trial_runs import copy_module, modules_with_hooks, undisturbed

#: How many of the last norms and layers of a module are tried: behind the last norm of
#: a branch, a gate may have layers of its own (squeeze-and-excitation has two).
TRIES = 4
#: Factor on inputs that shows a clamp, small enough for half precision.
LARGE = 16


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a module has itself."""
    return [p for p in module._parameters.values() if p is not None]


@dataclass
class _Call:
    """A call of a module that may be a residual block.

    Attributes:
        given: A copy of its input, which code may change in place.
        leaves: Names of the norms and layers that it has called so far.
    """

    given: Tensor
    leaves: list[str] = field(default_factory=list)


class _Trials:
    """Tries each module that may be a residual block while the model runs.

    Attributes:
        last: By the name of a module, what lets it return its input.
        calls: How often each module was called.
    """

    def __init__(self) -> None:
        self.last: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self._leaves: dict[str, nn.Module] = {}
        self._open: list[tuple[str, _Call | None]] = []
        self._is_trying = False

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Watch all calls of modules."""
        handles = []
        for name, module in modules_with_hooks(model):
            if name and _is_norm_or_layer(module):
                self._leaves[name] = module
                handles.append(module.register_forward_pre_hook(self._leaf(name)))
            elif name and _may_be_block(module):
                before, after = self._hooks(name)
                handles.append(
                    module.register_forward_pre_hook(before, with_kwargs=True)
                )
                handles.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leaf(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not self._is_trying:
                self.calls[name] += 1
                for _, call in self._open:
                    if call is not None:
                        call.leaves.append(name)

        return hook

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_trying:
                return
            self.calls[name] += 1
            is_single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            fits = is_single and self.calls[name] == 1 and args[0].is_floating_point()
            call = _Call(args[0].detach().clone()) if fits else None
            self._open.append((name, call))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._is_trying:
                return
            _, call = self._open.pop()
            if call is None or not isinstance(output, Tensor):
                return
            if output.shape == call.given.shape and output.dtype == call.given.dtype:
                self._try(name, module, call)

        return before, after

    def _try(self, name: str, module: nn.Module, call: _Call) -> None:
        self._is_trying = True
        try:
            leaves = list(dict.fromkeys(reversed(call.leaves)))
            with _attributes_restored(module):
                for leaf in [n for n in leaves if n.startswith(f'{name}.')][:TRIES]:
                    if _returns_input(module, self._leaves[leaf], call.given):
                        self.last[name] = leaf
                        return
        finally:
            self._is_trying = False


def _is_norm_or_layer(module: nn.Module) -> bool:
    """Return whether a module has a weight, perhaps a bias, and nothing else."""
    parameters = {n for n, p in module._parameters.items() if p is not None}
    is_plain = parameters <= {'weight', 'bias'} and 'weight' in parameters
    return is_plain and not any(True for _ in module.children())


def _may_be_block(module: nn.Module) -> bool:
    """Return whether a module has parts and is no mere sequence of them."""
    is_sequence = type(module).forward in (nn.Sequential.forward, nn.Module.forward)
    return not is_sequence and any(True for _ in module.children())


@torch.no_grad()
def rescaled(model: nn.Module) -> nn.Module:
    """Return a copy in which a shortcut that learns is no identity any more.

    A scale or a layer of its own may start as one; the scales that are vectors are
    random in the probe already.
    """
    other, generator = copy_module(model), torch.Generator().manual_seed(2)
    for parameter in other.parameters():
        if parameter.dim() != 1:
            noise = torch.rand(parameter.shape, generator=generator, device='cpu')
            parameter.mul_((noise + 0.5).to(parameter))
    return other


@torch.no_grad()
def _returns_input(block: nn.Module, last: nn.Module, given: Tensor) -> bool:
    """Return whether a block gives back its input once ``last`` puts out zero.

    It must do so whatever the size of its input: values that a clamp would change, as
    that of ReLU6, and rows and columns that it would crop to even numbers.
    """
    parameters = parameters_of(last)
    before = [p.detach().clone() for p in parameters]
    try:
        for parameter in parameters:
            parameter.zero_()
        if not all(torch.equal(block(x.clone()), x) for x in (given, LARGE * given)):
            return False
        return not any(_is_changed(block, x) for x in _cropped(given))
    except Exception as error:
        error_line(error)  # raises it if memory ran out
        return False
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


@contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore attributes, in which modules may keep what they computed."""
    before = [(vars(m), dict(vars(m))) for m in module.modules()]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


def _cropped(given: Tensor) -> list[Tensor]:
    """Return (N, C, H, W) without its last row, and without its last column."""
    dims = [d for d in (2, 3) if given.dim() == 4 and given.shape[d] > 1]
    return [given.narrow(d, 0, given.shape[d] - 1) for d in dims]


def _is_changed(block: nn.Module, x: Tensor) -> bool:
    """Return whether a block changes an input; where it fails, it does not go on."""
    try:
        return not torch.equal(block(x.clone()), x)
    except Exception as error:
        error_line(error)
        return False


def blocks_called(model: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, str]:
    """Run the model and return blocks that are called once, with their last layers."""
    trials = _Trials()
    with undisturbed(model), torch.no_grad(), trials.watch(model):
        call(model)
    once = {name for name, count in trials.calls.items() if count == 1}
    return {n: last for n, last in trials.last.items() if {n, last} <= once}
