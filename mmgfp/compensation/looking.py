"""A run of a model that shows which modules read from which weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.compensation.inputs import LinearSystem, unsupported
from mmgfp.compensation.recording import Call, watch
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import undisturbed

#: How far a layer's output may be from what its weight gives, as a share.
TOLERANCE = 1e-3
#: Positions that this is looked at.
PROBES = 64


@dataclass
class ModuleCalls:
    """All calls of a module in one forward pass."""

    nodes: list[Any] = field(default_factory=list)  # that made its inputs
    outputs: list[Any] = field(default_factory=list)  # edges of its outputs
    positions: int = 0
    is_linear: bool = True

    def add(self, x: Tensor, y: Tensor, layer: nn.Module | None) -> None:
        """Add a call, of a layer or of a norm."""
        self.nodes.append(x.grad_fn)
        if layer is None or not y.requires_grad:
            return
        self.outputs.append(torch.autograd.graph.get_gradient_edge(y))
        if unsupported(layer) is None:
            system = LinearSystem(layer)
            count = y.numel() // (system.outputs * system.groups)
            self.positions += count
            self.is_linear &= count == 0 or _is_linear(system, x, y, count)


def _is_linear(system: LinearSystem, x: Tensor, y: Tensor, count: int) -> bool:
    """Return whether some outputs are what the weight gives for the inputs."""
    with torch.no_grad():
        index = torch.linspace(0, count - 1, PROBES, device=x.device).long()
        rows = torch.cat([*system.rows(x.detach(), index)], 1)
        expected = system.targets(y.detach())[:, index]
        difference = (rows @ system.matrix() - expected).abs().max()
        return bool(difference <= TOLERANCE * expected.abs().max())


def look(
    model: nn.Module,
    call: Call,
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    with_gradients: bool,
) -> tuple[dict[str, ModuleCalls], WeightGraph, dict[str, float]]:
    """Run the model once, and return calls, the graph, and what `_scales` gives."""
    seen: dict[str, ModuleCalls] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        seen.setdefault(name, ModuleCalls()).add(x, y, layers.get(name))

    with undisturbed(model), torch.enable_grad(), watch({**layers, **norms}, note):
        loss = call(model)
        graph = WeightGraph(model, loss, seen.values())
        # Before buffers that the graph holds are restored.
        scales = _scales(loss, seen) if with_gradients else {}
    return seen, graph, scales


def _scales(loss: Tensor, seen: Mapping[str, ModuleCalls]) -> dict[str, float]:
    """Return the mean squared gradient of the loss by the outputs of each layer."""
    edges = {name: entry.outputs for name, entry in seen.items() if entry.outputs}
    flat = [edge for each in edges.values() for edge in each]
    grads = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    scales = {}
    for name, each in edges.items():
        known = [g for g in (next(grads) for _ in each) if g is not None]
        count = sum(g.numel() for g in known)
        total = sum(float(g.double().square().sum()) for g in known)
        scales[name] = total / count if count else 0.0
    return scales


class WeightGraph:
    """The weights that lie above each node of an autograd graph.

    Attributes:
        readers: How many nodes read each parameter, by its name.
    """

    def __init__(
        self, model: nn.Module, outputs: Any, seen: Iterable[ModuleCalls]
    ) -> None:
        self._names = [n for n, _ in model.named_parameters()]
        number = {id(p): i for i, p in enumerate(model.parameters())}
        self.readers = dict.fromkeys(self._names, 0)
        self._uses: Counter[Any] = Counter()
        #: By node, a number with one bit for each parameter above it.
        self._bits: dict[Any, int] = {None: 0}
        ends = [t.grad_fn for t in tree_tensors(outputs)]
        for entry in seen:
            ends += [*entry.nodes, *(edge.node for edge in entry.outputs)]
        stack = [e for e in ends if e is not None]
        while stack:
            node = stack[-1]
            operands = [n for n, _ in node.next_functions if n is not None]
            missing = [n for n in operands if n not in self._bits]
            if missing and node not in self._bits:
                stack += missing
                continue
            stack.pop()
            if node in self._bits:
                continue
            i = number.get(id(getattr(node, 'variable', None)))
            bits = 0 if i is None else 1 << i
            self._uses.update(operands)
            for operand in operands:
                bits |= self._bits[operand]
                j = number.get(id(getattr(operand, 'variable', None)))
                if j is not None:
                    self.readers[self._names[j]] += 1
            self._bits[node] = bits

    def norms_of(
        self, entry: ModuleCalls, norms: Mapping[str, ModuleCalls]
    ) -> tuple[str, ...]:
        """Return the norms that read a layer's outputs, and nothing else.

        There are none if anything but norms reads these outputs.
        """
        outputs = Counter(edge.node for edge in entry.outputs)
        readers = {n: s for n, s in norms.items() if outputs.keys() & set(s.nodes)}
        read = Counter(node for s in readers.values() for node in s.nodes)
        is_all = len(entry.outputs) == len(entry.nodes) and read == outputs
        once = all(self._uses[node] == 1 for node in outputs)
        return tuple(readers) if is_all and once else ()

    def above(self, entry: ModuleCalls) -> set[str]:
        """Return the parameters that the inputs of a module depend on."""
        bits = 0
        for node in entry.nodes:
            bits |= self._bits[node]
        return {n for i, n in enumerate(self._names) if bits >> i & 1}
