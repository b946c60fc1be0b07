"""Which layers can make up for removed channels, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmgfp.compensation.inputs import LinearSystem, unsupported
from mmgfp.compensation.recording import Call, watch
from mmgfp.groups import Grouping, module_of
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.layers import is_layer, output_dim
from mmgfp.utils.modules import weight_owners
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import undisturbed

SHARED = 'several modules share its weight'
ELSEWHERE = 'its weight is also read outside of its own calls'
NOT_CALLED = 'no call of its module was seen'
NOT_LINEAR = 'its output is not what its weight gives for its input'
LOOP = 'it reads what it has written itself'
#: How far a layer's output may be from what its weight gives, as a share.
TOLERANCE = 1e-3
#: Positions that this is looked at.
PROBES = 64


@dataclass
class Layer:
    """A layer whose inputs the removed channels change.

    Attributes:
        weight: Name of its weight.
        original: The module in the original model.
        small: The module in the compact model.
        kept_inputs: Its input channels that are left, (C,); None if all are.
        kept_outputs: Its output channels that are left; None if all are.
        level: Number of changed layers that it reads from, along the longest way.
        calls: How often it is called in a forward pass.
        positions: Output positions of a batch, P.
        scale: Mean squared gradient of the loss by its outputs.
        loses_inputs: Whether it reads removed channels itself, not just what layers
            that do have written.
        norms: Batch norms that read its outputs and nothing else, unless something else
            reads these: outputs may then be shifted, as the norms can take it back.
        reason: Why it is left alone, else None.
    """

    weight: str
    original: nn.Module
    small: nn.Module
    kept_inputs: Tensor | None
    kept_outputs: Tensor | None
    level: int = 0
    calls: int = 0
    positions: int = 0
    scale: float = 0.0
    loses_inputs: bool = True
    norms: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def system(self) -> LinearSystem:
        """The layer in the compact model, as a linear system."""
        return LinearSystem(self.small, bool(self.norms))

    @property
    def name(self) -> str:
        """Name of its module."""
        return module_of(self.weight)


@dataclass(frozen=True)
class Norm:
    """A batch norm whose inputs the removed channels change.

    Attributes:
        name: Its name.
        small: The module in the compact model.
        level: The highest level of the layers that it reads from.
        calls: How often it is called in a forward pass.
    """

    name: str
    small: Any
    level: int
    calls: int


@dataclass
class Survey:
    """Layers and norms that the removed channels reach.

    Attributes:
        layers: Layers whose inputs change, in the order in which they are called.
        norms: Batch norms whose inputs change.
        others: Weights that read less but are no layer's, and why they are left alone.
    """

    layers: list[Layer]
    norms: list[Norm]
    others: dict[str, str]


@dataclass
class _Seen:
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


def survey(
    model: nn.Module,
    small: nn.Module,
    grouping: Grouping,
    kept: np.ndarray,
    structure: PruneStructure,
    call: Call,
    with_gradients: bool,
) -> Survey:
    """Run the original once and say what the removed channels reach.

    Args:
        model: The original model, in eval mode, with parameters that require gradients.
        small: The compact one.
        grouping: The original's groups.
        kept: Which units the compact one has, (U,).
        structure: What it has of each tensor.
        call: Runs a model on a batch.
        with_gradients: Whether the call returns a loss whose gradients are needed.
    """
    owners, norms = _candidates(model)
    layer_modules = {weight: modules[0] for weight, modules in owners.items()}
    seen, graph, scales = _look(model, call, layer_modules, norms, with_gradients)
    above = {name: graph.above(entry) for name, entry in seen.items()}
    lost = _read_less(grouping, kept)
    changed = lost | {name for name, weights in above.items() if weights & lost}
    levels = _levels(changed, above)
    small_modules = dict(small.named_modules())
    in_order = [w for w in owners if w not in seen] + [*seen]
    layers = []
    for weight in [w for w in in_order if w in owners and w in changed]:
        module, entry = owners[weight][0], seen.get(weight, _Seen())
        layer = Layer(
            weight,
            module,
            small_modules[module_of(weight)],
            _kept_inputs(grouping.inputs.get(weight), kept),
            _kept_outputs(weight, module, structure),
            levels[weight],
            len(entry.nodes),
            entry.positions,
            scales.get(weight, 0.0),
            weight in lost,
            graph.norms_of(entry, {n: seen[n] for n in norms if n in seen}),
        )
        layer.reason = _reason(layer, len(owners[weight]), entry, graph, above)
        layers.append(layer)
    reached = [
        Norm(n, small_modules[n], levels[n] - 1, len(seen[n].nodes))
        for n in norms
        if n in changed
    ]
    return Survey(layers, reached, dict.fromkeys(lost - owners.keys(), NOT_CALLED))


def _look(
    model: nn.Module,
    call: Call,
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    with_gradients: bool,
) -> tuple[dict[str, _Seen], _Graph, dict[str, float]]:
    """Run the model once, and return calls, the graph, and what `_scales` gives."""
    seen: dict[str, _Seen] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        seen.setdefault(name, _Seen()).add(x, y, layers.get(name))

    with undisturbed(model), torch.enable_grad(), watch({**layers, **norms}, note):
        loss = call(model)
        graph = _Graph(model, loss, seen.values())
        # Before buffers that the graph holds are restored.
        scales = _scales(loss, seen) if with_gradients else {}
    return seen, graph, scales


def _candidates(
    model: nn.Module,
) -> tuple[dict[str, list[nn.Module]], dict[str, nn.Module]]:
    """Return layers by their weight, all that share it, and batch norms by name."""
    modules = dict(model.named_modules())
    owners: dict[str, list[nn.Module]] = {
        weight: [modules[n] for n in names]
        for weight, names in weight_owners(model).items()
        if all(is_layer(modules[n]) for n in names)
    }
    norms: dict[str, nn.Module] = {
        n: m
        for n, m in modules.items()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    return owners, norms


def _read_less(grouping: Grouping, kept: np.ndarray) -> set[str]:
    """Return the names of the weights that read channels that are gone.

    A group convolution loses a channel's outputs with it, and so nothing.
    """
    ends = np.cumsum([g.units for g in grouping.groups])
    return {
        member.name
        for group, end in zip(grouping.groups, ends, strict=True)
        if not kept[end - group.units : end].all()
        for member in group.members
        if member.role == 'in'
    }


def _levels(changed: set[str], above: Mapping[str, set[str]]) -> dict[str, int]:
    """Return how many of the changed layers each one reads from, on the longest way.

    Args:
        changed: Weights of layers and names of norms.
        above: The weights that each reads from, by any way.
    """
    levels: dict[str, int] = {}
    # Whoever reads from another layer has more weights above it than that one.
    for name in sorted(changed, key=lambda n: len(above.get(n, ()))):
        below = [levels[w] + 1 for w in above.get(name, ()) if w in levels]
        levels[name] = max(below, default=0)
    return levels


def _kept_inputs(units: np.ndarray | None, kept: np.ndarray) -> Tensor | None:
    """Return the input channels that are left, of layers with these units, (C,)."""
    if units is None:
        return None
    stays = np.append(kept, True)[units]  # the last entry is for -1
    return None if stays.all() else torch.from_numpy(np.flatnonzero(stays))


def _kept_outputs(
    weight: str, module: nn.Module, structure: PruneStructure
) -> Tensor | None:
    """Return the output channels of a layer that are left, None if all are."""
    left = structure.kept.get(weight, {}).get(output_dim(module))
    return None if left is None else torch.tensor(left)


def _reason(
    layer: Layer,
    owners: int,
    entry: _Seen,
    graph: _Graph,
    above: Mapping[str, set[str]],
) -> str | None:
    """Return why a layer cannot be refitted, None if it can."""
    if owners > 1:
        return SHARED
    if not entry.nodes:
        return NOT_CALLED
    reason = unsupported(layer.original)
    if reason is None and graph.readers[layer.weight] > layer.calls:
        reason = ELSEWHERE
    if reason is None and not entry.is_linear:
        reason = NOT_LINEAR
    if reason is None and layer.weight in above[layer.weight]:
        reason = LOOP
    return reason


def _scales(loss: Tensor, seen: Mapping[str, _Seen]) -> dict[str, float]:
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


class _Graph:
    """The weights that lie above each node of an autograd graph.

    Attributes:
        readers: How many nodes read each parameter, by its name.
    """

    def __init__(self, model: nn.Module, outputs: Any, seen: Iterable[_Seen]) -> None:
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

    def norms_of(self, entry: _Seen, norms: Mapping[str, _Seen]) -> tuple[str, ...]:
        """Return the norms that read a layer's outputs, and nothing else.

        There are none if anything but norms reads these outputs.
        """
        outputs = Counter(edge.node for edge in entry.outputs)
        readers = {n: s for n, s in norms.items() if outputs.keys() & set(s.nodes)}
        read = Counter(node for s in readers.values() for node in s.nodes)
        is_all = len(entry.outputs) == len(entry.nodes) and read == outputs
        once = all(self._uses[node] == 1 for node in outputs)
        return tuple(readers) if is_all and once else ()

    def above(self, entry: _Seen) -> set[str]:
        """Return the parameters that the inputs of a module depend on."""
        bits = 0
        for node in entry.nodes:
            bits |= self._bits[node]
        return {n for i, n in enumerate(self._names) if bits >> i & 1}
