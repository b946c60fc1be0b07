"""What is found out about a model before the first prune: groups, rows, work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from mmgfp.criteria.fisher import untapped, weight_owners
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.profile import (
    Forward,
    LossFunction,
    all_parameters_require_grad,
    profile_layers,
    undisturbed,
    watch_outputs,
    without_checkpointing,
)
from mmgfp.discovery.verify import Disagreement, find_disagreements
from mmgfp.groups import ChannelGroup, FrozenLayer, Grouping, Member, Role, is_layer
from mmgfp.selection.costs import LayerProfile
from mmgfp.surgery.compact import has_attribute_rule
from mmgfp.surgery.structure import shapes_of
from mmgfp.tracing import (
    RowUse,
    Trace,
    judge_rows,
    trace_loss,
    watch_rows,
    watch_widths,
)
from mmgfp.utils.errors import ConfigError, TraceError

logger = logging.getLogger('mmgfp')

#: Why a group is frozen that failed the proof; the difference follows.
DISPROVED = 'masked and compact disagree'
#: Why a group is frozen under ``coupled=False``.
SHARED = 'its channels are shared by several layers, and coupled=False'


@dataclass(frozen=True)
class Discovery:
    """What pruning has to know about a model.

    Attributes:
        grouping: The groups, proven.
        rows: Which layers read images and which RoIs.
        profiles: What each layer works on for one image, by the name of its weight.
    """

    grouping: Grouping
    rows: RowUse
    profiles: dict[str, LayerProfile]

    def to_dict(self) -> dict[str, Any]:
        """Plain types and tensors, as a checkpoint holds them."""
        return {
            'groups': [
                {
                    'name': group.name,
                    'members': [
                        [m.name, m.dim, torch.from_numpy(m.index.copy()), m.role]
                        for m in group.members
                    ],
                }
                for group in self.grouping.groups
            ],
            'frozen': [[f.layer, f.reason, f.channels] for f in self.grouping.frozen],
            'inputs': {
                n: torch.from_numpy(x.copy()) for n, x in self.grouping.inputs.items()
            },
            'rows': {
                f.name: dict(value) if f.name == 'lost' else sorted(value)
                for f in fields(self.rows)
                for value in [getattr(self.rows, f.name)]
            },
            'work': {
                n: [w.macs_positions, w.out_positions, w.out_dim]
                for n, w in self.profiles.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], model: nn.Module) -> Discovery:
        """Read what `to_dict` gave.

        Raises:
            ConfigError: ``data`` is damaged or of another model.
        """
        try:
            return _read(data, model)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                'checkpoint',
                'the groups of coupled channels of this model',
                f'{type(error).__name__}: {error}',
                'resume with the configuration that the run was started with',
            ) from error


@dataclass(frozen=True)
class ModelTrace:
    """What a forward pass of the loss shows of a model.

    Attributes:
        trace: The labels of its channels, and which are equal or frozen.
        rows: Which layers read images and which RoIs.
        unread: Weights of layers that no statistics can be taken off, and why.
    """

    trace: Trace
    rows: RowUse
    unread: dict[str, str]


def trace_model(
    model: nn.Module, loss: LossFunction, strict: bool = False
) -> ModelTrace:
    """Run the loss once and follow all channels through its graph.

    Args:
        model: The module; it is left as it is.
        loss: Computes the training loss of the module it is given, a scalar, on a
            real batch.
        strict: Raise at an op without a rule.

    Raises:
        TraceError: The loss has no graph, or ``strict`` says so.
    """
    with (
        undisturbed(model),
        all_parameters_require_grad(model),
        without_checkpointing(),
        torch.enable_grad(),
        watch_rows(model) as calls,
        watch_widths(model, has_attribute_rule) as widths,
        watch_outputs(model) as outputs,
    ):
        value = loss(model)
        trace = trace_loss(model, value, strict, widths, outputs)
    rows = judge_rows(calls)
    weights = [call.weight for call in trace.calls]
    return ModelTrace(trace, rows, untapped(weights, weight_owners(model), rows))


def own_profiles(
    model: nn.Module, profiles: Mapping[str, LayerProfile]
) -> dict[str, LayerProfile]:
    """Work of the weights that are parameters of the model, by their first names."""
    owned = {n for n, _ in model.named_parameters()}
    return {n: w for n, w in profiles.items() if n in owned}


def discover(
    model: nn.Module,
    loss: LossFunction,
    forward: Forward,
    images: int,
    profiles: Mapping[str, LayerProfile] | None = None,
    keep: Sequence[str] = (),
    coupled: bool = True,
    strict: bool = False,
) -> Discovery:
    """Find the coupled channels of a model and prove them.

    Args:
        model: The module; it is left as it is.
        loss: Computes the training loss of the module it is given, a scalar, on a
            real batch.
        forward: Returns all outputs that the module it is given has at inference.
        images: Number of images in the batch of ``forward``.
        profiles: What each layer works on, by weight, for one image; recorded from
            ``forward`` if not given.
        keep: Names or patterns of layers that are to be left alone.
        coupled: Whether channels that several layers share may go.
        strict: Raise at an op without a rule, or where the proof fails.

    Raises:
        TraceError: Nothing can be pruned; under ``strict``, also what is said there.
        ConfigError: A pattern of ``keep`` matches no layer.
    """
    seen = trace_model(model, loss, strict)
    trace, unread = seen.trace, seen.unread
    for op, layers in trace.unknown_ops.items():
        logger.warning('op %s has no rule; it freezes %s', op, ', '.join(layers))
    frozen: list[tuple[ChannelGroup, str]] = []
    if not coupled:
        every = build_groups(model, trace, keep, unread).groups
        frozen += [(g, SHARED) for g in every if not g.internal]
    while True:
        grouping = build_groups(model, trace, keep, unread, frozen)
        failures = find_disagreements(model, grouping, forward)
        if not failures:
            break
        _report(failures, strict)
        frozen += [(f.group, f'{DISPROVED}: {f.reason}') for f in failures]
    if not grouping.groups:
        reasons = dict.fromkeys(f.reason for f in grouping.frozen)
        raise TraceError(
            'model',
            'at least one group of channels that can be pruned',
            'none',
            f'every layer is left alone because: {"; ".join(reasons)}',
        )
    profiles = profile_layers(model, forward, images) if profiles is None else profiles
    return Discovery(grouping, seen.rows, own_profiles(model, profiles))


def _report(failures: Sequence[Disagreement], strict: bool) -> None:
    for failure in failures:
        members = ', '.join(f'{m.name}[{m.dim}]' for m in failure.group.members)
        logger.warning(
            'group %s is left alone, since %s (%s); its members: %s',
            failure.group.name,
            DISPROVED,
            failure.reason,
            members,
        )
    if strict:
        raise TraceError(
            f'groups {", ".join(f.group.name for f in failures)}',
            'equal outputs of the masked and the compact model',
            failures[0].reason,
            'name these layers in keep, or leave strict off to freeze them',
        )


def _read(data: Mapping[str, Any], model: nn.Module) -> Discovery:
    groups = tuple(
        ChannelGroup(
            str(group['name']),
            tuple(
                Member(str(name), dim, index.cpu().numpy(), role)
                for name, dim, index, role in group['members']
            ),
        )
        for group in data['groups']
    )
    _check_members(groups, model)
    frozen = tuple(FrozenLayer(*entry) for entry in data['frozen'])
    inputs = {n: index.cpu().numpy() for n, index in data['inputs'].items()}
    _check_inputs(inputs, sum(g.units for g in groups), model)
    layers = {n: frozenset(x) for n, x in data['rows'].items() if n != 'lost'}
    rows = RowUse(**layers, lost=dict(data['rows']['lost']))
    unknown = {*rows.lost, *rows.first.union(*layers.values())}
    unknown -= {n for n, _ in model.named_modules()}
    _require(not unknown, f'no layers {sorted(unknown)[:3]}')
    profiles = {n: LayerProfile(*entry) for n, entry in data['work'].items()}
    _check_work(profiles, model)
    return Discovery(Grouping(groups, frozen, inputs), rows, profiles)


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise ValueError(problem)


def _check_members(groups: Sequence[ChannelGroup], model: nn.Module) -> None:
    """Every entry of a unit must be one of the model's and belong to no other unit.

    Raises:
        ValueError: One is not.
    """
    shapes = shapes_of(model) | {
        n: tuple(t.shape)
        for n, t in [*model.named_parameters(), *model.named_buffers()]
    }
    taken: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in groups:
        _require(bool(group.layers('out')), f'no layer makes the group {group.name}')
        for member in group.members:
            name, dim, index = member.name, member.dim, member.index
            _require(member.role in get_args(Role), f'{name}: role {member.role!r}')
            shape = shapes[name]
            fine = type(dim) is int and 0 <= dim < len(shape)
            _require(fine, f'{name} has no dimension {dim!r}')
            fine = index.dtype.kind == 'i' and index.ndim == 2 and index.size > 0
            _require(fine, f'{name}: indices of {index.dtype} {index.shape}')
            fine = index.min() >= 0 and index.max() < shape[dim]
            _require(fine, f'{name} has no such channels')
            fine = len(index) == group.units
            _require(fine, f'{name}: {len(index)} units, not {group.units}')
            taken.setdefault((name, dim), []).append(index.reshape(-1))
    for (name, _), parts in taken.items():
        entries = np.concatenate(parts)
        fine = len(np.unique(entries)) == len(entries)
        _require(fine, f'{name}: channels of several units')


def _check_inputs(
    inputs: Mapping[str, np.ndarray], units: int, model: nn.Module
) -> None:
    """Every input channel of a layer must belong to a unit or to none (-1).

    Raises:
        ValueError: One does not.
    """
    parameters, owners = dict(model.named_parameters()), weight_owners(model)
    for name, index in inputs.items():
        _require(name in parameters, f'no weight {name}')
        fine = index.dtype.kind == 'i' and index.ndim == 1
        fine = fine and index.min(initial=-1) >= -1 and index.max(initial=-1) < units
        _require(fine, f'{name} reads no such units')
        for owner in owners.get(name, ()):
            module: Any = model.get_submodule(owner)
            width = getattr(module, 'in_channels', getattr(module, 'in_features', None))
            fine = not is_layer(module) or len(index) == width
            _require(fine, f'{name} reads {width} channels, not {len(index)}')


def _check_work(profiles: Mapping[str, LayerProfile], model: nn.Module) -> None:
    """Costs must be finite and of the model's layers.

    Raises:
        ValueError: They are not.
    """
    parameters = dict(model.named_parameters())
    for name, layer in profiles.items():
        _require(name in parameters, f'no weight {name}')
        positions = (layer.macs_positions, layer.out_positions)
        fine = all(isinstance(x, int | float) and 0 <= x < inf for x in positions)
        fine = fine and layer.out_dim in range(min(parameters[name].dim(), 2))
        _require(fine, f'{name}: work {layer}')
