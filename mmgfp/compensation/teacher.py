"""What the layers of a compact model should give: the outputs of the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.recording import Call, watch
from mmgfp.compensation.sampling import Target
from mmgfp.compensation.survey import Layer
from mmgfp.utils.trial_runs import undisturbed


@dataclass
class _Call:
    x: Tensor | None
    y: Tensor
    edge: torch.autograd.graph.GradientEdge | None = None


class Teacher:
    """Runs the original model, and keeps what it gives as far as memory allows.

    Args:
        model: The original model, in eval mode, with parameters that require gradients.
        calls: Run a model on one batch each.
        layers: The layers to be refitted.
        config: The options.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        layers: Sequence[Layer],
        config: CompensationConfig,
    ) -> None:
        self.model, self.calls, self.config = model, calls, config
        self.layers = {layer.weight: layer for layer in layers}
        self._size = next(model.parameters()).element_size()
        self._kept: dict[int, dict[str, list[Target]]] = {}
        self._done: set[str] = set()

    def targets(
        self, batch: int, layers: Sequence[Layer], with_inputs: bool = False
    ) -> dict[str, list[Target]]:
        """Return the calls of some layers on a batch, by the name of the weight."""
        if with_inputs:
            return self._run(batch, layers, with_inputs)
        kept = self._kept.setdefault(batch, {})
        if any(layer.weight not in kept for layer in layers):
            self._kept[batch] = kept = self._run(batch, self._next(layers), False)
        return {layer.weight: kept[layer.weight] for layer in layers}

    def _next(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return layers, and those whose turn is next as far as memory allows."""
        chosen = {layer.weight: layer for layer in layers}
        limit = self.config.memory / 3 / self._size
        kept = sum(self._kept_numbers(layer) for layer in layers)
        whole = sum(self._whole_numbers(layer) for layer in layers)
        waiting = [x for n, x in self.layers.items() if n not in self._done]
        for layer in sorted(waiting, key=lambda x: x.level):
            if layer.weight in chosen:
                continue
            kept += self._kept_numbers(layer)
            whole += self._whole_numbers(layer)
            if max(kept * len(self.calls), whole) > limit:
                break
            chosen[layer.weight] = layer
        return [*chosen.values()]

    def _kept_numbers(self, layer: Layer) -> int:
        """Return how many numbers are kept of a layer for a batch."""
        system = layer.system
        rows = min(layer.positions, layer.calls * self.config.rows)
        return rows * system.groups * (system.outputs + 1)

    def _whole_numbers(self, layer: Layer) -> int:
        """Return how many outputs and gradients there are before rows are sampled."""
        tensors = 2 if self.config.method == 'fisher' else 1
        return layer.positions * layer.system.groups * layer.system.outputs * tensors

    def forget(self, layers: Sequence[Layer]) -> None:
        """Drop what is kept of layers that are done."""
        self._done |= {layer.weight for layer in layers}
        for targets in self._kept.values():
            for layer in layers:
                targets.pop(layer.weight, None)

    def _run(
        self, batch: int, layers: Sequence[Layer], with_inputs: bool
    ) -> dict[str, list[Target]]:
        seen: dict[str, list[_Call]] = {layer.weight: [] for layer in layers}
        is_weighted = self.config.method == 'fisher'

        def note(name: str, x: Tensor, y: Tensor) -> None:
            # Copies, since what comes next may change both in place.
            layer = self.layers[name]
            kept = _select_inputs(layer, x.detach()) if with_inputs else None
            edge = None
            if is_weighted and y.requires_grad:
                edge = torch.autograd.graph.get_gradient_edge(y)
            seen[name].append(_Call(kept, _select_outputs(layer, y.detach()), edge))

        watched = {layer.weight: layer.original for layer in layers}
        gradients = torch.set_grad_enabled(is_weighted)
        with undisturbed(self.model), gradients, watch(watched, note):
            loss = self.calls[batch](self.model)
            edges = [c.edge for calls in seen.values() for c in calls if c.edge]
            # Before buffers that the graph holds are restored.
            grads = torch.autograd.grad(loss, edges, allow_unused=True) if edges else ()
        by_call = iter(grads)
        return {
            name: [
                self._target(
                    self.layers[name], c, next(by_call) if c.edge else None
                ).sampled(self.config.rows, batch)
                for c in calls
            ]
            for name, calls in seen.items()
        }

    def _target(self, layer: Layer, call: _Call, grad: Tensor | None) -> Target:
        system = layer.system
        y = system.targets(call.y)
        if self.config.method != 'fisher':
            importance = y.new_ones(y.shape[0], y.shape[2])
            return Target(y, None, importance, y.shape[1], call.x)
        squares = torch.zeros_like(y)
        if grad is not None and layer.scale > 0:
            grad = system.by_position(_select_outputs(layer, grad))
            squares = grad.square() / layer.scale
        return Target(y, squares.mean(2), squares.sum(1), y.shape[1], call.x)


def _select_outputs(layer: Layer, y: Tensor) -> Tensor:
    """Return a copy of the outputs, or their gradients, that the compact model has."""
    return _select(layer, y, layer.kept_outputs)


def _select_inputs(layer: Layer, x: Tensor) -> Tensor:
    """Return a copy of the inputs that the compact model has."""
    return _select(layer, x, layer.kept_inputs)


def _select(layer: Layer, x: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return x.clone()
    original: Any = layer.original
    # Convolutions may be given one image without a dimension for it.
    is_linear = isinstance(original, nn.Linear)
    dim = x.dim() - 1 - (0 if is_linear else len(original.kernel_size))
    return x.index_select(dim, kept.to(x.device))
