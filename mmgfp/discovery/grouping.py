"""From labels to groups of coupled channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from mmgfp.groups import (
    ChannelGroup,
    FrozenLayer,
    Grouping,
    Member,
    Role,
    module_of,
)
from mmgfp.tracing import NO_LABEL, Trace
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import is_layer


def matches(layer: str, pattern: str) -> bool:
    """Whether ``pattern`` names the layer, a module around it, or fits as a glob."""
    return fnmatchcase(layer, pattern) or layer.startswith(f'{pattern}.')


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
        trace: What tracing found.
        keep: Names or glob patterns of layers that stay as they are, on their input
            and on their output side.
        unscorable: Weights of layers whose inputs are left alone, with the reason.
        frozen_groups: Groups found before on the same trace that are to be left
            alone, with the reason.

    Raises:
        ConfigError: A pattern of ``keep`` matches no layer.
    """
    _freeze_named(model, trace, _kept_layers(model, trace, keep))
    table = trace.table
    for call in trace.calls:
        if unscorable and call.weight in unscorable:
            layer, reason = module_of(call.weight), unscorable[call.weight]
            table.freeze(call.inputs, f'read by {layer}: {reason}')
    for group, reason in frozen_groups:
        member = group.members[0]  # the others are equated with it
        table.freeze(table.vectors[member.name, member.dim][member.index], reason)
    components = table.components()
    reasons = table.frozen(components)
    produced, consumed = table.produced(), table.consumed()
    prunable = _members_of(components, produced) & _members_of(components, consumed)
    for component in _whole_dimensions(trace, components):
        reasons.setdefault(component, ['all its channels are one unit'])
    prunable[list(reasons)] = False
    groups, unit_of = _collect(trace, components, prunable, produced, consumed)
    inputs = {
        call.weight: _units_of_labels(call.inputs.numpy(), components, unit_of)
        for call in reversed(trace.calls)
    }
    frozen = _frozen_layers(model, trace, components, prunable, reasons)
    return Grouping(tuple(groups), tuple(frozen), inputs)


def layer_names(model: nn.Module, trace: Trace) -> list[str]:
    """All layers: the Conv/FC modules, and what else was traced as a layer."""
    found = [n for n, m in model.named_modules() if is_layer(m)]
    traced = [module_of(call.weight) for call in trace.calls]
    return list(dict.fromkeys(found + traced))


def _weight_owners(model: nn.Module) -> dict[str, str]:
    """For every name of a layer, the name under which its weight is traced."""
    first = {id(p): module_of(n) for n, p in model.named_parameters()}
    return {
        n: first.get(id(m.weight), n)
        for n, m in model.named_modules(remove_duplicate=False)
        if is_layer(m)
    }


def _kept_layers(model: nn.Module, trace: Trace, keep: Iterable[str]) -> dict[str, str]:
    owners = {n: n for n in layer_names(model, trace)} | _weight_owners(model)
    kept: dict[str, str] = {}
    for pattern in keep:
        found = [owner for n, owner in owners.items() if matches(n, pattern)]
        if not found:
            raise ConfigError(
                'keep',
                'names or patterns of Conv/FC layers of the model',
                repr(pattern),
                'see the layer names that tools/analyze.py lists',
            )
        kept |= dict.fromkeys(found, 'kept as configured')
    return kept


def _freeze_named(model: nn.Module, trace: Trace, layers: Mapping[str, str]) -> None:
    """Freeze every labelled dimension of the layers' parameters."""
    for (name, _), vector in trace.table.vectors.items():
        if module_of(name) in layers:
            trace.table.freeze(vector, layers[module_of(name)])
    for call in trace.calls:  # a group conv's inputs are on no dimension of its own
        if module_of(call.weight) in layers:
            trace.table.freeze(call.inputs, layers[module_of(call.weight)])


def _members_of(components: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Which components hold a marked label."""
    found = np.zeros(components.max(initial=-1) + 1, dtype=bool)
    found[components[mask]] = True
    return found


def _whole_dimensions(trace: Trace, components: np.ndarray) -> set[int]:
    """Components that hold all of a tensor dimension, of which nothing would stay."""
    firsts = set()
    for vector in trace.table.vectors.values():
        own = components[vector.numpy()]
        if (own == own[0]).all():
            firsts.add(int(own[0]))
    return firsts


def _units_of_labels(
    labels: np.ndarray, components: np.ndarray, unit_of: np.ndarray
) -> np.ndarray:
    known = labels != NO_LABEL
    units = np.full(labels.shape, -1)
    units[known] = unit_of[components[labels[known]]]
    return units


def _collect(
    trace: Trace,
    components: np.ndarray,
    prunable: np.ndarray,
    produced: np.ndarray,
    consumed: np.ndarray,
) -> tuple[list[ChannelGroup], np.ndarray]:
    """Groups, and the unit number of each component (-1 where it is not prunable)."""
    signatures: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    entries: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for (name, dim), own in _labelled_dimensions(trace, components):
        order = np.argsort(own, kind='stable')
        found, starts = np.unique(own[order], return_index=True)
        parts = np.split(order, starts[1:])
        entries[name, dim] = {}
        for component, index in zip(found.tolist(), parts, strict=True):
            if component >= 0 and prunable[component]:
                entries[name, dim][component] = index
                signatures[component].append((name, dim, len(index)))
    alike: dict[tuple[tuple[str, int, int], ...], list[int]] = defaultdict(list)
    for component, signature in signatures.items():
        alike[tuple(signature)].append(component)
    groups = []
    unit_of = np.full(prunable.shape, -1)
    count = 0
    for key, units in alike.items():
        units.sort(key=lambda c: int(entries[key[0][:2]][c][0]))
        members = []
        for name, dim, _ in key:
            role: Role = 'attribute'
            if name not in trace.widths:
                first = int(trace.table.vectors[name, dim][0])
                made, read = produced[first], consumed[first]
                role = 'out' if made else 'in' if read else 'with'
            index = np.stack([entries[name, dim][c] for c in units])
            members.append(Member(name, dim, index, role))
        makers = [m.name for m in members if m.role == 'out']
        groups.append(ChannelGroup(module_of(makers[0]), tuple(members)))
        unit_of[units] = np.arange(count, count + len(units))
        count += len(units)
    return groups, unit_of


def _labelled_dimensions(
    trace: Trace, components: np.ndarray
) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """Components along each dimension of each tensor, then of each attribute."""
    for key, vector in trace.table.vectors.items():
        yield key, components[vector.numpy()]
    for name, vectors in trace.widths.items():
        found = []
        for labels in (vector.numpy() for vector in vectors):
            found.append(np.where(labels == NO_LABEL, -1, components[labels]))
        # Tensors that may come to differ in width have no width in common.
        if all(np.array_equal(own, found[0]) for own in found):
            yield (name, 0), found[0]


def _frozen_layers(
    model: nn.Module,
    trace: Trace,
    components: np.ndarray,
    prunable: np.ndarray,
    reasons: dict[int, list[str]],
) -> list[FrozenLayer]:
    """Every layer with output channels that stay, with the reason."""
    produced = trace.table.produced()
    outputs = {}
    for (name, _), vector in trace.table.vectors.items():
        if produced[vector.numpy()].all():
            outputs[module_of(name)] = components[vector.numpy()]
    traced = {module_of(call.weight) for call in trace.calls}
    owners = _weight_owners(model)
    frozen = []
    for layer in layer_names(model, trace):
        owner = owners.get(layer, layer)
        if owner not in traced and owner not in outputs:
            reason, stay = 'took no part in the loss', _width(model, layer)
        elif owner not in outputs:
            reason, stay = 'its output channels carry no labels', _width(model, layer)
        else:
            left = outputs[owner][~prunable[outputs[owner]]]
            if not left.size:
                continue
            found = dict.fromkeys(r for c in left for r in reasons.get(int(c), ()))
            reason = '; '.join(found) or 'no further layer reads its output'
            stay = int(left.size)
        frozen.append(FrozenLayer(layer, reason, stay))
    return frozen


def _width(model: nn.Module, layer: str) -> int:
    """Output channels of a layer."""
    module: Any = model.get_submodule(layer)
    features: int = getattr(module, 'out_features', 1)
    return getattr(module, 'out_channels', features)
