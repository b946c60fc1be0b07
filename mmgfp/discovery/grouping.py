"""From labels to groups of coupled channels.

Labels that tracing has equated form a component, which can only go as a whole. A
component that may go is a unit; units that take slices of the same dimensions of the
same tensors form a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.groups import (
    ChannelGroup,
    FrozenLayer,
    Grouping,
    Member,
    Role,
    module_of,
)
from mmgfp.tracing import Trace
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import is_layer, matches, output_dim
from mmgfp.utils.modules import weight_owners

#: A tensor's name and one of its dimensions.
Dimension = tuple[str, int]


@dataclass(frozen=True)
class _Components:
    """Connected sets of labels.

    Attributes:
        of_label: The component of each label, and -1 at the end, for `NO_LABEL`.
        prunable: Whether a component may go, shape (components,).
        reasons: Why components stay that something freezes.
    """

    of_label: np.ndarray
    prunable: np.ndarray
    reasons: dict[int, list[str]]


def build_groups(
    model: nn.Module,
    trace: Trace,
    keep: Sequence[str] = (),
    unscorable: Mapping[str, str] | None = None,
    frozen_groups: Iterable[tuple[ChannelGroup, str]] = (),
) -> Grouping:
    """Collect the units of a traced model into groups.

    Args:
        model: The traced module.
        trace: Its trace.
        keep: Names or glob patterns of layers that stay as they are, on both sides.
        unscorable: Weights of layers whose inputs are left alone, with the reason.
        frozen_groups: Groups of the same trace that are left alone, with the reason.

    Raises:
        ConfigError: If a pattern of ``keep`` matches no layer.

    Examples:
        >>> import torch
        >>> from mmgfp.tracing import trace_loss
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> loss = net(torch.ones(1, 3, 8, 8)).sum()
        >>> grouping = build_groups(net, trace_loss(net, loss))
        >>> [(g.name, g.units, [m.role for m in g.members]) for g in grouping.groups]
        [('0', 4, ['out', 'with', 'in'])]
        >>> grouping.frozen[0].reason
        'an output: reaches the loss without a further layer'
    """
    traced_names = _traced_names(model, trace)
    _freeze_layers(trace, _kept_layers(traced_names, keep), 'kept as configured')
    _freeze_layers(trace, _compiled_modules(model), 'compiled by torch.jit')
    for call in trace.calls:
        if unscorable and call.weight in unscorable:
            reason = f'read by {module_of(call.weight)}: {unscorable[call.weight]}'
            trace.table.freeze(call.inputs, reason)
    for group, reason in frozen_groups:
        first = group.members[0]  # the others are equated with it
        vector = trace.table.vectors[first.name, first.dim]
        trace.table.freeze(vector[first.index], reason)
    components = _find_components(trace)
    groups, unit_of = _collect(trace, components)
    # The first call of a shared layer comes last, and stands.
    inputs = {
        call.weight: unit_of[components.of_label[call.inputs.numpy()]]
        for call in reversed(trace.calls)
    }
    frozen = tuple(_frozen_layers(model, trace, components, traced_names))
    return Grouping(tuple(groups), frozen, inputs)


def _traced_names(model: nn.Module, trace: Trace) -> dict[str, str]:
    """Map all names of each layer to the name under which its weight is traced.

    Layers are the Conv/FC modules, and what else was traced as a layer. The two names
    differ where weights or modules are shared.
    """
    traced_as = {
        name: module_of(weight)
        for weight, names in weight_owners(model, aliases=True).items()
        for name in names
    }
    modules = model.named_modules(remove_duplicate=False)
    layers = {n: traced_as.get(n, n) for n, m in modules if is_layer(m)}
    traced = {module_of(call.weight): module_of(call.weight) for call in trace.calls}
    return traced | layers


def _kept_layers(traced_names: Mapping[str, str], keep: Iterable[str]) -> set[str]:
    """Return the layers that ``keep`` names, by the names under which they are traced.

    Raises:
        ConfigError: If a pattern matches no layer.
    """
    kept: set[str] = set()
    for pattern in keep:
        matching = {t for n, t in traced_names.items() if matches(n, pattern)}
        if not matching:
            raise ConfigError(
                'keep',
                'names or patterns of Conv/FC layers of the model',
                repr(pattern),
                'see the layer names that tools/analyze.py lists',
            )
        kept |= matching
    return kept


def _compiled_modules(model: nn.Module) -> set[str]:
    """Return the names of scripted and traced modules, whose code is fixed."""
    modules = model.named_modules()
    return {n for n, m in modules if isinstance(m, torch.jit.ScriptModule)}


def _freeze_layers(trace: Trace, layers: set[str], reason: str) -> None:
    """Freeze every labelled dimension of the layers' parameters."""
    for (name, _), labels in trace.table.vectors.items():
        if module_of(name) in layers:
            trace.table.freeze(labels, reason)
    for call in trace.calls:
        # No dimension of a group conv's weight holds all channels that it reads.
        if module_of(call.weight) in layers:
            trace.table.freeze(call.inputs, reason)


def _find_components(trace: Trace) -> _Components:
    """Find the connected sets of labels, and which of them may go.

    A layer must make the channels, and a further one read them, since a mask lies on
    the inputs of layers; and nothing may have frozen them.
    """
    table = trace.table
    of_label = table.components()
    reasons = table.frozen(of_label)
    for labels in table.vectors.values():
        component, *others = of_label[labels.numpy()].tolist()
        if all(other == component for other in others):
            # Without this unit nothing of the dimension would remain.
            reasons.setdefault(component, ['all its channels are one unit'])
    prunable = np.ones(of_label.max(initial=-1) + 1, dtype=bool)
    for marked in (table.produced(), table.consumed()):
        prunable &= np.isin(np.arange(len(prunable)), of_label[marked])
    prunable[list(reasons)] = False
    return _Components(np.append(of_label, -1), prunable, reasons)


def _collect(
    trace: Trace, components: _Components
) -> tuple[list[ChannelGroup], np.ndarray]:
    """Form groups of the prunable components.

    Returns:
        tuple: The groups, and the unit number of each component, -1 where it stays.
        The last entry of the numbers is -1 too, for channels without a component.
    """
    entries = _entries(trace, components)
    footprints: dict[int, list[tuple[Dimension, int]]] = defaultdict(list)
    for dimension, indices in entries.items():
        for component, index in indices.items():
            footprints[component].append((dimension, len(index)))
    alike: dict[tuple[tuple[Dimension, int], ...], list[int]] = defaultdict(list)
    for component, footprint in footprints.items():
        alike[tuple(footprint)].append(component)
    roles = _roles(trace)
    groups = []
    unit_of = np.full(len(components.prunable) + 1, -1)
    count = 0
    for shared, units in alike.items():
        dimensions = [dimension for dimension, _ in shared]
        # Units are numbered in the order of the channels that come first.
        first_entries = {c: int(entries[dimensions[0]][c][0]) for c in units}
        units.sort(key=first_entries.__getitem__)
        members = tuple(
            Member(
                *dimension,
                np.stack([entries[dimension][c] for c in units]),
                roles.get(dimension, 'attribute'),
            )
            for dimension in dimensions
        )
        maker = next(m.name for m in members if m.is_output)
        groups.append(ChannelGroup(module_of(maker), members))
        unit_of[units] = np.arange(count, count + len(units))
        count += len(units)
    return groups, unit_of


def _entries(
    trace: Trace, components: _Components
) -> dict[Dimension, dict[int, np.ndarray]]:
    """Find the entries of each dimension that each prunable component takes."""
    entries: dict[Dimension, dict[int, np.ndarray]] = {}
    for dimension, of_entry in _labelled_dimensions(trace, components):
        order = np.argsort(of_entry, kind='stable')
        numbers, starts = np.unique(of_entry[order], return_index=True)
        parts = np.split(order, starts[1:])
        entries[dimension] = {
            component: index
            for component, index in zip(numbers.tolist(), parts, strict=True)
            if component >= 0 and components.prunable[component]
        }
    return entries


def _labelled_dimensions(
    trace: Trace, components: _Components
) -> Iterator[tuple[Dimension, np.ndarray]]:
    """Yield the component of each entry of all tensor dimensions, then attributes."""
    for dimension, labels in trace.table.vectors.items():
        yield dimension, components.of_label[labels.numpy()]
    for name, vectors in trace.widths.items():
        first, *others = (components.of_label[v.numpy()] for v in vectors)
        # Tensors whose widths may come to differ have none that one attribute counts.
        if all(np.array_equal(first, other) for other in others):
            yield (name, 0), first


def _roles(trace: Trace) -> dict[Dimension, Role]:
    """Return what each tensor dimension is to its units."""
    produced, consumed = trace.table.produced(), trace.table.consumed()
    roles: dict[Dimension, Role] = {}
    for dimension, labels in trace.table.vectors.items():
        # Code may use slices of a dimension, so that its first entry tells too little.
        entries = labels.numpy()
        is_output, is_input = produced[entries].any(), consumed[entries].any()
        alone: Role = 'out' if is_output else 'in' if is_input else 'with'
        roles[dimension] = 'both' if is_output and is_input else alone
    return roles


def _frozen_layers(
    model: nn.Module,
    trace: Trace,
    components: _Components,
    traced_names: Mapping[str, str],
) -> list[FrozenLayer]:
    """List every layer with output channels that stay, with the reason."""
    produced = trace.table.produced()
    # Of a tied weight, which may be read either way round, a layer's own outputs count.
    own = {n: output_dim(m) for n, m in model.named_modules() if is_layer(m)}
    dimensions = sorted(
        trace.table.vectors, key=lambda key: key[1] == own.get(module_of(key[0]), 0)
    )
    outputs = {
        module_of(name): components.of_label[labels.numpy()]
        for name, dim in dimensions
        if produced[(labels := trace.table.vectors[name, dim]).numpy()].all()
    }
    traced = dict.fromkeys(module_of(call.weight) for call in trace.calls)
    modules = [name for name, module in model.named_modules() if is_layer(module)]
    frozen = []
    for layer in dict.fromkeys([*modules, *traced]):
        traced_as = traced_names[layer]
        if traced_as in outputs:
            channels = outputs[traced_as]
            staying = channels[~components.prunable[channels]]
            if not staying.size:
                continue
            reasons = [r for c in staying for r in components.reasons.get(int(c), ())]
            reason = '; '.join(dict.fromkeys(reasons))
            reason = reason or 'no further layer reads its output'
            frozen.append(FrozenLayer(layer, reason, int(staying.size)))
        else:
            reason = 'its output channels carry no labels'
            if traced_as not in traced:
                reason = 'took no part in the loss'
            frozen.append(FrozenLayer(layer, reason, _width(model, layer)))
    return frozen


def _width(model: nn.Module, layer: str) -> int:
    """Return the number of output channels of a layer."""
    module: Any = model.get_submodule(layer)
    features: int = getattr(module, 'out_features', 1)
    return getattr(module, 'out_channels', features)
