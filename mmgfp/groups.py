"""Groups of coupled channels, and what is left of them when some are cut out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

#: What a member is to its unit: made by the layer, read by it, or taken along.
#: A module's attribute that counts the unit among its channels is a member, too.
Role = Literal['out', 'in', 'with', 'attribute']

#: Modules that count as layers (paper section 3.1: "only Conv/FC layers matter").
LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear)


def is_layer(module: nn.Module) -> bool:
    """Whether a module counts as a layer (paper section 3.1: Conv and FC layers).

    Deformable convolutions of mmcv and torchvision are known by their weight, since
    they have no base class in common with the others.
    """
    if isinstance(module, LAYER_TYPES):
        return True
    weight: Any = getattr(module, 'weight', None)
    names = ('out_channels', 'in_channels', 'groups', 'kernel_size')
    if not isinstance(weight, Tensor) or not all(hasattr(module, n) for n in names):
        return False
    conv: Any = module
    return weight.shape[:2] == (conv.out_channels, conv.in_channels // conv.groups)


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that loses a slice with every unit.

    Attributes:
        name: Name of the parameter or buffer, or of a module's attribute.
        dim: Its dimension; 0 for an attribute.
        index: Which entries belong to each unit, shape (units, entries per unit).
        role: ``'out'`` for a layer's output dimension, ``'in'`` for its input
            dimension, ``'with'`` for norms, biases and element-wise parameters,
            ``'attribute'`` for a number of channels.
    """

    name: str
    dim: int
    index: np.ndarray
    role: Role

    @property
    def width(self) -> int:
        """Entries that one unit takes."""
        return self.index.shape[1]


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are coupled in the same way.

    A unit is the smallest set of channels that can only be removed together; all
    units of a group touch the same dimensions of the same tensors.

    Attributes:
        name: The layer that makes the channels (the first one, where several do).
        members: The dimensions that shrink with each unit.
    """

    name: str
    members: tuple[Member, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return self.members[0].index.shape[0]

    @property
    def internal(self) -> bool:
        """Whether one layer makes the channels and one other reads them (paper's -I).

        A group convolution does both, so its channels are never internal.
        """
        return len(self.layers('out')) == len(self.layers('in')) == 1

    def layers(self, role: Role) -> list[str]:
        """Names of the layers in which the units have ``role``."""
        return [module_of(m.name) for m in self.members if m.role == role]


@dataclass(frozen=True)
class FrozenLayer:
    """A layer that keeps output channels, and why.

    Attributes:
        layer: Name of the layer.
        reason: Why its channels stay.
        channels: How many of its output channels stay.
    """

    layer: str
    reason: str
    channels: int


@dataclass(frozen=True)
class Grouping:
    """The groups of a model, and what is left out.

    Attributes:
        groups: Groups in the order in which data meets them.
        frozen: Layers with output channels that no unit can remove.
        inputs: For each layer's weight, the unit that each of its input channels
            belongs to, shape (C_in,), or -1. Units are numbered through all groups.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenLayer, ...]
    inputs: dict[str, np.ndarray]

    @property
    def units(self) -> int:
        """Number of units in all groups."""
        return sum(g.units for g in self.groups)

    @property
    def group_of(self) -> np.ndarray:
        """Group number of each unit, shape (units,)."""
        sizes = [g.units for g in self.groups]
        return np.repeat(np.arange(len(sizes)), sizes)

    def remaining(self, kept: np.ndarray) -> Grouping:
        """The groups of the model that is cut down to the units ``kept``, (U,).

        Units are numbered anew; groups stay in order and keep some units each.
        """
        gone = gone_entries(self.groups, kept)
        parts = np.split(kept, np.cumsum([g.units for g in self.groups])[:-1])
        groups = [
            ChannelGroup(
                group.name, tuple(_moved(m, gone, some) for m in group.members)
            )
            for group, some in zip(self.groups, parts, strict=True)
        ]
        number = np.append(np.cumsum(kept) - 1, -1)  # the last one is for no unit
        stays = np.append(kept, True)
        inputs = {n: number[index[stays[index]]] for n, index in self.inputs.items()}
        return Grouping(tuple(groups), self.frozen, inputs)


def gone_entries(
    groups: Sequence[ChannelGroup], kept: np.ndarray
) -> dict[tuple[str, int], np.ndarray]:
    """Which entries of each tensor's dimensions are those of units that went.

    Args:
        groups: The groups of the units.
        kept: Units that stay, (U,).

    Returns:
        dict: Ascending entries by name and dimension, where there are any.
    """
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    start = 0
    for group in groups:
        went = ~kept[start : start + group.units]
        start += group.units
        for member in group.members if went.any() else ():
            parts = gone.setdefault((member.name, member.dim), [])
            parts.append(member.index[went].reshape(-1))
    return {key: np.unique(np.concatenate(parts)) for key, parts in gone.items()}


def _moved(
    member: Member, gone: Mapping[tuple[str, int], np.ndarray], kept: np.ndarray
) -> Member:
    """A member of the units ``kept`` alone, where entries before it are ``gone``."""
    index = member.index[kept]
    before = gone.get((member.name, member.dim))
    if before is not None:
        index = index - np.searchsorted(before, index)
    return replace(member, index=index)


def module_of(tensor: str) -> str:
    """Name of the module that owns the tensor called ``tensor``."""
    return tensor.rpartition('.')[0]
