"""The state of a pruning run in a checkpoint: named keys, versioned, validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from mmgfp.config import PruningConfig
from mmgfp.criteria.base import CRITERIA
from mmgfp.discovery.discover import Discovery
from mmgfp.groups import (
    ChannelGroup,
    FrozenLayer,
    Grouping,
    Member,
    ResidualBlock,
    Role,
)
from mmgfp.selection.costs import LayerProfile
from mmgfp.selection.targets import Target
from mmgfp.surgery.structure import shapes_of
from mmgfp.tracing import RowUse
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.layers import is_layer
from mmgfp.utils.modules import weight_owners
from mmgfp.utils.plain import plain, same, short

#: Version of the entries that `RunState.to_dict` gives.
VERSION = 2
#: Options that groups, costs and the sums so far depend on: a resumed run keeps them.
FIXED_OPTIONS = (
    'keep',
    'coupled',
    'criterion',
    'recover',
    'input_shape',
    'latency_profile',
)
#: What states without an option were saved with, where that is not None.
NEWER_OPTIONS = {'recover': False}
REMEDY = 'resume with the configuration that the run was started with'


@dataclass(frozen=True)
class RunState:
    """State needed to resume a pruning run.

    Attributes:
        discovery: The facts about the unpruned model.
        iteration: Iterations so far.
        kept: Units that were not pruned, (U,).
        in_model: Units that are still in the model, masked or not, (U,).
        criterion: State of the criterion.
        reached: Targets that are met.
        aside: Columns kept aside by weight, of the model and of each copy.
    """

    discovery: Discovery
    iteration: int
    kept: np.ndarray
    in_model: np.ndarray
    criterion: Mapping[str, Any]
    reached: tuple[Target, ...]
    aside: Sequence[Mapping[str, torch.Tensor]] = ()

    def to_dict(self, config: PruningConfig) -> dict[str, Any]:
        """Return plain types and tensors, as a checkpoint holds them.

        Args:
            config: The options of the run.
        """
        return {
            'version': VERSION,
            'options': _fixed_options(config),
            'discovery': discovery_to_dict(self.discovery),
            'iteration': self.iteration,
            'kept': torch.from_numpy(self.kept.copy()),
            'in_model': torch.from_numpy(self.in_model.copy()),
            'criterion': dict(self.criterion),
            'reached': [asdict(target) for target in self.reached],
            'aside': [dict(values) for values in self.aside],
        }

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], model: nn.Module, config: PruningConfig
    ) -> RunState:
        """Read the state that `to_dict` gave.

        Args:
            raw: The state.
            model: The model, unpruned.
            config: The options of the resumed run.

        Raises:
            ConfigError: If the state is damaged, of another version, of another model
                or of other options.
        """
        version = raw.get('version') if isinstance(raw, Mapping) else None
        if version != VERSION:
            raise ConfigError(
                'checkpoint',
                f'a pruning state of version {VERSION}',
                f'version {version!r}',
                'start pruning anew from the weights, with load_from',
            )
        try:
            for name, value in _fixed_options(config).items():
                # Older states lack newer options.
                saved = raw['options'].get(name, NEWER_OPTIONS.get(name))
                if not same(saved, value):
                    raise ConfigError(name, short(saved), short(value), REMEDY)
            discovery = discovery_from_dict(raw['discovery'], model)
            # A runner may have loaded the checkpoint onto a GPU.
            kept, in_model = (
                raw[key].cpu().numpy().copy() for key in ('kept', 'in_model')
            )
            reached = tuple(
                Target.parse({t['cost']: t['ratio']}) for t in raw['reached']
            )
            iteration, criterion = _count(raw['iteration']), dict(raw['criterion'])
            aside = [dict(values) for values in raw.get('aside', ())]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            got = f'{type(error).__name__}: {error}'
            raise ConfigError('checkpoint', 'a pruning state', got, REMEDY) from error
        for units in (kept, in_model):
            _check_units(units, discovery.grouping)
        if (kept & ~in_model).any():
            expected = 'kept units among those that are in the model'
            raise ConfigError('checkpoint', expected, 'others', REMEDY)
        return cls(discovery, iteration, kept, in_model, criterion, reached, aside)


def _count(value: Any) -> int:
    if not 0 <= value < float('inf'):
        raise ValueError(f'iteration {value}')
    return int(value)


def _fixed_options(config: PruningConfig) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in FIXED_OPTIONS}
    options['blocks'] = config.blocks or None  # older states lack it
    if config.profile is not None:  # wherever the file lies, and whatever it is called
        options['latency_profile'] = f'the profile {config.profile.digest}'
    spec = config.criterion
    arguments = dict(spec) if isinstance(spec, Mapping) else {'type': spec}
    arguments['type'] = CRITERIA.canonical(arguments['type'])
    # A name alone means the same as a dict of nothing else.
    options['criterion'] = arguments if len(arguments) > 1 else arguments['type']
    return plain(options | {'keep': sorted(set(config.keep))})


def discovery_to_dict(discovery: Discovery) -> dict[str, Any]:
    """Return a discovery in plain types and tensors, for files and other processes."""
    grouping = discovery.grouping
    return {
        'groups': [
            {
                'name': group.name,
                'members': [
                    asdict(m) | {'index': torch.from_numpy(m.index.copy())}
                    for m in group.members
                ],
            }
            for group in grouping.groups
        ],
        'frozen': [asdict(layer) for layer in grouping.frozen],
        'inputs': {n: torch.from_numpy(x.copy()) for n, x in grouping.inputs.items()},
        'blocks': [asdict(block) for block in grouping.blocks],
        'rows': {
            f.name: dict(value) if f.name == 'lost' else sorted(value)
            for f in fields(discovery.rows)
            for value in [getattr(discovery.rows, f.name)]
        },
        'profiles': {n: asdict(p) for n, p in discovery.profiles.items()},
    }


def discovery_from_dict(data: Mapping[str, Any], model: nn.Module) -> Discovery:
    """Read and validate the discovery that `discovery_to_dict` gave.

    Args:
        data: The discovery.
        model: The model, unpruned.

    Raises:
        ConfigError: If ``data`` is damaged or of another model.
    """
    try:
        return _read_discovery(data, model)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            'checkpoint',
            'the groups of coupled channels of this model',
            f'{type(error).__name__}: {error}',
            REMEDY,
        ) from error


def _read_discovery(data: Mapping[str, Any], model: nn.Module) -> Discovery:
    groups = tuple(
        ChannelGroup(
            str(group['name']),
            tuple(
                Member(**{**member, 'index': member['index'].cpu().numpy()})
                for member in group['members']
            ),
        )
        for group in data['groups']
    )
    _check_members(groups, model)
    frozen = tuple(FrozenLayer(**layer) for layer in data['frozen'])
    inputs = {n: index.cpu().numpy() for n, index in data['inputs'].items()}
    _check_inputs(inputs, sum(g.units for g in groups), model)
    layers = {n: frozenset(x) for n, x in data['rows'].items() if n != 'lost'}
    rows = RowUse(**layers, lost=dict(data['rows']['lost']))
    unknown = {*rows.lost, *rows.first.union(*layers.values())}
    unknown -= {n for n, _ in model.named_modules()}
    _require(not unknown, f'no layers {sorted(unknown)[:3]}')
    profiles = {n: LayerProfile(**profile) for n, profile in data['profiles'].items()}
    _check_profiles(profiles, model)
    blocks = tuple(ResidualBlock(**block) for block in data.get('blocks', ()))
    for block in blocks:
        last = model.get_submodule(block.last)
        is_block = block.holds(block.last) and any(True for _ in last.parameters(False))
        _require(is_block, f'no residual block {block}')
    return Discovery(Grouping(groups, frozen, inputs, blocks), rows, profiles)


def _require(is_valid: bool, problem: str) -> None:
    if not is_valid:
        raise ValueError(problem)


def _check_units(units: np.ndarray, grouping: Grouping) -> None:
    """Refuse anything but a mask of the groups' units that leaves some of each.

    Raises:
        ConfigError: If it is something else.
    """
    expected, got = f'a mask of {grouping.units} units', str(len(units))
    is_valid = units.shape == (grouping.units,)
    if is_valid:
        expected, got = f'{expected} that leaves some of each group', str(units.dtype)
        is_valid = units.dtype == bool
    if is_valid:
        counts = np.bincount(grouping.group_of[units], minlength=len(grouping.names))
        gone = set(grouping.blocks_among(~units))
        may_be_empty = {
            g
            for block in grouping.blocks
            if block.name in gone
            for g in grouping.groups_inside(block)
        }
        empty = [
            group.name
            for g, group in enumerate(grouping.groups)
            if not counts[g] and g not in may_be_empty
        ]
        is_valid, got = not empty, f'none of {", ".join(empty)}'
    if not is_valid:
        raise ConfigError('checkpoint', expected, got, REMEDY)


def _check_members(groups: Sequence[ChannelGroup], model: nn.Module) -> None:
    """Refuse entries that are not the model's, or belong to several units.

    Raises:
        ValueError: If there is such an entry.
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
            has_dim = type(dim) is int and 0 <= dim < len(shape)
            _require(has_dim, f'{name} has no dimension {dim!r}')
            is_index = index.dtype.kind == 'i' and index.ndim == 2 and index.size > 0
            _require(is_index, f'{name}: indices of {index.dtype} {index.shape}')
            is_inside = index.min() >= 0 and index.max() < shape[dim]
            _require(is_inside, f'{name} has no such channels')
            is_whole = len(index) == group.units
            _require(is_whole, f'{name}: {len(index)} units, not {group.units}')
            taken.setdefault((name, dim), []).append(index.reshape(-1))
    for (name, _), parts in taken.items():
        entries = np.concatenate(parts)
        are_distinct = len(np.unique(entries)) == len(entries)
        _require(are_distinct, f'{name}: channels of several units')


def _check_inputs(
    inputs: Mapping[str, np.ndarray], units: int, model: nn.Module
) -> None:
    """Refuse input channels of a layer that belong to no unit and are not -1 either.

    Raises:
        ValueError: If there is such a channel.
    """
    parameters, owners = dict(model.named_parameters()), weight_owners(model)
    for name, index in inputs.items():
        _require(name in parameters, f'no weight {name}')
        is_index = index.dtype.kind == 'i' and index.ndim == 1
        is_index = is_index and index.min(initial=-1) >= -1
        _require(
            is_index and index.max(initial=-1) < units, f'{name} reads no such units'
        )
        for owner in owners.get(name, ()):
            module: Any = model.get_submodule(owner)
            width = getattr(module, 'in_channels', getattr(module, 'in_features', None))
            fits = not is_layer(module) or len(index) == width
            _require(fits, f'{name} reads {width} channels, not {len(index)}')


def _check_profiles(profiles: Mapping[str, LayerProfile], model: nn.Module) -> None:
    """Refuse profiles that are not finite, or of no layer of the model.

    Raises:
        ValueError: If there is such a profile.
    """
    parameters = dict(model.named_parameters())
    for name, profile in profiles.items():
        _require(name in parameters, f'no weight {name}')
        positions = (profile.macs_positions, profile.out_positions)
        is_finite = all(isinstance(x, int | float) and 0 <= x < inf for x in positions)
        has_dim = profile.out_dim in range(min(parameters[name].dim(), 2))
        _require(is_finite and has_dim, f'{name}: {profile}')
