"""What a pruning run that was interrupted goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.discovery.discover import Discovery
from mmgfp.groups import Grouping
from mmgfp.selection.greedy import Target
from mmgfp.utils.errors import ConfigError

#: Version of what `PrunerState.to_dict` gives.
VERSION = 1
REMEDY = 'resume with the configuration that the run was started with'


@dataclass(frozen=True)
class PrunerState:
    """Everything that changes while a model is pruned.

    Attributes:
        discovery: What is known about the model as it was at first.
        iteration: Iterations so far.
        kept: Units that were not pruned, (U,).
        in_model: Units that are still in the model, masked or not, (U,).
        statistics: What `UnitStatistics.state_dict` gives.
        reached: Targets that are met.
    """

    discovery: Discovery
    iteration: int
    kept: np.ndarray
    in_model: np.ndarray
    statistics: Tensor
    reached: list[Target]

    def to_dict(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Plain types and tensors, as a checkpoint holds them.

        Args:
            options: Arguments that the discovery depends on.
        """
        return {
            'version': VERSION,
            'options': {
                n: list(v) if isinstance(v, tuple) else v for n, v in options.items()
            },
            'discovery': self.discovery.to_dict(),
            'iteration': self.iteration,
            'kept': torch.from_numpy(self.kept.copy()),
            'in_model': torch.from_numpy(self.in_model.copy()),
            'statistics': self.statistics,
            'reached': [{t.cost: t.ratio} for t in self.reached],
        }

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], model: nn.Module, options: Mapping[str, Any]
    ) -> PrunerState:
        """Read what `to_dict` gave.

        Args:
            raw: The state.
            model: The model, unpruned.
            options: Arguments that the discovery depends on, as they are now.

        Raises:
            ConfigError: The state is damaged, of another version, of another model or
                of other options.
        """
        version = raw.get('version')
        if version != VERSION:
            raise ConfigError(
                'checkpoint',
                f'a pruning state of version {VERSION}',
                repr(version),
                'start pruning anew from the weights, with load_from',
            )
        try:
            for name, value in raw['options'].items():
                own = options[name]
                if (list(own) if isinstance(own, tuple) else own) != value:
                    raise ConfigError(name, repr(value), repr(own), REMEDY)
            discovery = Discovery.from_dict(raw['discovery'], model)
            # A runner may have loaded the checkpoint onto a GPU.
            kept, in_model = (
                raw[key].cpu().numpy().copy() for key in ('kept', 'in_model')
            )
            reached = [Target.parse(t) for t in raw['reached']]
            iteration, statistics = int(raw['iteration']), raw['statistics']
        except (KeyError, TypeError, AttributeError) as error:
            got = f'{type(error).__name__}: {error}'
            raise ConfigError('checkpoint', 'a pruning state', got, REMEDY) from error
        for units in (kept, in_model):
            _check_units(units, discovery.grouping)
        if (kept & ~in_model).any():
            expected = 'units that stay among those that were not cut out'
            raise ConfigError('checkpoint', expected, 'others', REMEDY)
        return cls(discovery, iteration, kept, in_model, statistics, reached)


def _check_units(units: np.ndarray, grouping: Grouping) -> None:
    """A mask must be one of the groups' units and leave some of each.

    Raises:
        ConfigError: It does not.
    """
    expected, got = f'a mask of {grouping.units} units', str(len(units))
    fine = units.shape == (grouping.units,)
    if fine:
        expected, got = f'{expected} that leaves some of each group', str(units.dtype)
        fine = units.dtype == bool
    if fine:
        left = np.bincount(grouping.group_of[units], minlength=len(grouping.groups))
        empty = [g.name for g, n in zip(grouping.groups, left, strict=True) if not n]
        fine, got = not empty, f'none of {", ".join(empty)}'
    if not fine:
        raise ConfigError('checkpoint', expected, got, REMEDY)
