"""Dead branches: modules that run although nothing reads what they put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.discovery.probing import error_line, run
from mmgfp.surgery.blocks import replace_module_
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import (
    Forward,
    LossFunction,
    copy_module,
    modules_with_hooks,
    undisturbed,
    whole_graph,
)

#: Why modules stay that get no gradient.
NOT_CALLED = 'it, or a part of it, is not called in training and in inference'


@dataclass(frozen=True)
class DeadBranches:
    """Modules that get no gradient.

    Attributes:
        names: Those that `torch.nn.Identity` can replace, in the model's order.
        reasons: Why others stay, by name.
    """

    names: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


def find_dead_branches(
    model: nn.Module, loss: LossFunction, forward: Forward
) -> DeadBranches:
    """Find the modules whose outputs reach neither the loss nor any output.

    Their parameters get no gradient at all (not a gradient of zero); and with
    `torch.nn.Identity` in their places the training loss and all outputs in eval mode
    are the same, bit by bit. Of modules within modules the outer ones count.

    Args:
        model: The module; it is left as it is.
        loss: Computes the training loss of the module it is given, on a real batch.
        forward: Returns all outputs that the module it is given has at inference.

    Examples:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 3)
        ...     def forward(self, x):
        ...         x = self.a(x)
        ...         self.b(x)
        ...         return x
        >>> x = torch.ones(1, 2)
        >>> find_dead_branches(Net(), lambda m: m(x).sum(), lambda m: m(x)).names
        ('b',)
    """
    unread = parameters_without_gradient(model, loss)
    if not unread:
        return DeadBranches()
    called = _called(model, loss) & _called(model, forward)
    training = {name for name, module in model.named_modules() if module.training}
    checks = (_Same(model, loss, training), _Same(model, forward))
    candidates = _candidates(model, unread, called)
    names = _replaceable(model, candidates, checks)
    order = [name for name, _ in model.named_modules()]
    reasons = {name: reason for name, reason in candidates.items() if reason}
    return DeadBranches(
        tuple(sorted(names, key=order.index)), _outermost(reasons, names)
    )


def _replaceable(
    model: nn.Module, candidates: dict[str, str | None], checks: Sequence[_Same]
) -> list[str]:
    """Return the candidates that can be replaced; note why others cannot be."""
    names: list[str] = []
    small, has_more = copy_module(model), True
    while has_more:  # a branch may read another one, which can go only after it
        has_more = False
        for name in [n for n, reason in candidates.items() if reason is not None]:
            if any(name.startswith(f'{outer}.') for outer in names):
                candidates[name] = None
            elif candidates[name] != NOT_CALLED:
                trial = copy_module(small)
                replace_module_(trial, name, nn.Identity())
                reason = next((r for check in checks if (r := check(trial))), None)
                candidates[name] = reason
                if reason is None:
                    names = [n for n in names if not n.startswith(f'{name}.')] + [name]
                    small, has_more = trial, True
    return names


def _candidates(
    model: nn.Module, unread: set[str], called: set[str]
) -> dict[str, str | None]:
    """Return modules none of whose parameters is read, with why they stay, if known."""
    candidates: dict[str, str | None] = {}
    for name, module in model.named_modules():
        parameters = [f'{name}.{n}' for n, _ in module.named_parameters()]
        if name and parameters and unread.issuperset(parameters):
            owners = {p.rpartition('.')[0] for p in parameters}
            candidates[name] = '' if {name, *owners} <= called else NOT_CALLED
    return candidates


def _outermost(reasons: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Leave out modules around those that go, and those inside of others that stay."""
    return {
        name: reason
        for name, reason in reasons.items()
        if not any(n.startswith(f'{name}.') for n in names)
        and not any(name.startswith(f'{outer}.') for outer in reasons)
    }


def parameters_without_gradient(model: nn.Module, loss: LossFunction) -> set[str]:
    """Return the names of the parameters that the loss does not depend on."""
    with whole_graph(model):
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss(model), parameters, allow_unused=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is None}


@torch.no_grad()
def _called(model: nn.Module, call: Callable[[nn.Module], Any]) -> set[str]:
    """Return the names of the modules that run."""
    names: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: names.add(name))
        for name, module in modules_with_hooks(model)
    ]
    try:
        with undisturbed(model):
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return names


class _Same:
    """Says how a changed model differs in what a call of it returns.

    Args:
        model: The unchanged model.
        call: The call.
        training: Names of the modules that are in training mode; eval mode if None.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module], Any],
        training: set[str] | None = None,
    ) -> None:
        self._call, self._training = call, training or set()
        self._expected = self._outputs(copy_module(model))

    def __call__(self, changed: nn.Module) -> str | None:
        """Return how it differs, None if it does not."""
        try:
            outputs = self._outputs(changed)
        except Exception as error:
            return f'without it, {error_line(error)}'
        is_same = len(outputs) == len(self._expected) and all(
            map(torch.equal, outputs, self._expected)
        )
        return None if is_same else 'without it, outputs differ'

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        for name, module in model.named_modules():
            module.training = name in self._training
        return list(tree_tensors(run(model, self._call, in_double=False)))
