"""What is known of the backward pass that runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def in_backward() -> bool:
    """Return whether a backward pass runs."""
    return torch._C._current_graph_task_id() != -1


def is_reached(parameter: nn.Parameter) -> bool:
    """Return whether the backward pass that runs adds to a parameter's ``.grad``."""
    if not parameter.requires_grad:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # `torch.autograd.grad` asks for this very parameter
        return False


class ReachedParameters:
    """Whether backward passes add to the ``.grad`` of any of some parameters.

    Args:
        modules: The modules that the parameters are of.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._task: tuple[int, bool] = (-1, False)

    def are_reached(self) -> bool:
        """Return whether the pass that runs does; it is looked into once a pass."""
        task = torch._C._current_graph_task_id()
        if task != self._task[0]:
            parameters = (p for m in self._modules for p in m.parameters())
            self._task = (task, any(map(is_reached, parameters)))
        return self._task[1]
