"""Which layers can make up for removed channels, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmgfp.compensation.inputs import LinearSystem, unsupported
from mmgfp.compensation.looking import ModuleCalls, WeightGraph, look
from mmgfp.compensation.recording import Call
from mmgfp.groups import Grouping, module_of
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.layers import is_layer, output_dim
from mmgfp.utils.modules import weight_owners

SHARED = 'several modules share its weight'
ELSEWHERE = 'its weight is also read outside of its own calls'
NOT_CALLED = 'no call of its module was seen'
NOT_LINEAR = 'its output is not what its weight gives for its input'
LOOP = 'it reads what it has written itself'


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
        original: The module in the original model.
        small: The module in the compact model.
        kept: Its channels that are left, (C,); None if all are.
        level: The highest level of the layers that it reads from.
        calls: How often it is called in a forward pass.
    """

    name: str
    original: nn.Module
    small: Any
    kept: Tensor | None
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
    seen, graph, scales = look(model, call, layer_modules, norms, with_gradients)
    above = {name: graph.above(entry) for name, entry in seen.items()}
    lost = _read_less(grouping, kept, structure, owners)
    changed = lost | {name for name, weights in above.items() if weights & lost}
    levels = _levels({n for n in changed if not structure.is_gone(n)}, above)
    small_modules = dict(small.named_modules())
    in_order = [w for w in owners if w not in seen] + [*seen]
    layers = []
    for weight in [w for w in in_order if w in owners and w in levels]:
        module, entry = layer_modules[weight], seen.get(weight, ModuleCalls())
        layer = Layer(
            weight,
            module,
            small_modules[module_of(weight)],
            _kept_inputs(grouping.inputs.get(weight), kept),
            _kept_entries(weight, output_dim(module), structure),
            levels[weight],
            len(entry.nodes),
            entry.positions,
            scales.get(weight, 0.0),
            weight in lost,
            graph.norms_of(entry, {n: seen[n] for n in norms if n in seen}),
        )
        layer.reason = _reason(layer, len(owners[weight]), entry, graph, above)
        layers.append(layer)
    others = dict.fromkeys(lost - owners.keys(), NOT_CALLED)
    reached = _norms_of(norms, small_modules, structure, levels, seen)
    return Survey(layers, reached, others)


def _norms_of(
    norms: Mapping[str, nn.Module],
    small: Mapping[str, nn.Module],
    structure: PruneStructure,
    levels: Mapping[str, int],
    seen: Mapping[str, ModuleCalls],
) -> list[Norm]:
    """Return the norms that have a level, as what they read changes."""
    return [
        Norm(
            name,
            module,
            small[name],
            _kept_entries(f'{name}.running_mean', 0, structure),
            levels[name] - 1,
            len(seen[name].nodes),
        )
        for name, module in norms.items()
        if name in levels
    ]


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


def _read_less(
    grouping: Grouping,
    kept: np.ndarray,
    structure: PruneStructure,
    owners: Iterable[str],
) -> set[str]:
    """Return the names of the weights that read channels that are gone, or are gone.

    A group convolution loses a channel's outputs with it, and so nothing. A block that
    is gone need not have had channels of its own.
    """
    ends = np.cumsum([g.units for g in grouping.groups])
    return {weight for weight in owners if structure.is_gone(weight)} | {
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


def _kept_entries(name: str, dim: int, structure: PruneStructure) -> Tensor | None:
    """Return the entries of a tensor's dimension that are left, None if all are."""
    left = structure.kept.get(name, {}).get(dim)
    return None if left is None else torch.tensor(left)


def _reason(
    layer: Layer,
    owners: int,
    entry: ModuleCalls,
    graph: WeightGraph,
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
