"""Groups of coupled channels, and those that remain when some units are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

#: How a dimension takes part in a unit, see `Member`.
Role = Literal['out', 'in', 'both', 'with', 'attribute']


@dataclass(frozen=True)
class Member:
    """A dimension of a tensor that loses a slice with every removed unit.

    Attributes:
        name: Name of the parameter or buffer, or of a module's attribute.
        dim: Its dimension; 0 for an attribute.
        index: Which entries belong to each unit, shape (units, entries per unit).
        role: ``'out'`` for a layer's output dimension, ``'in'`` for its input
            dimension, ``'both'`` where tied weights are read either way round,
            ``'with'`` for norms, biases and element-wise parameters, ``'attribute'``
            for a number of channels.
    """

    name: str
    dim: int
    index: np.ndarray
    role: Role

    def __repr__(self) -> str:
        units = f'{len(self.index)} units of {self.width}'
        return f'Member({self.name}, dim {self.dim}, {self.role}, {units})'

    @property
    def width(self) -> int:
        """Entries that one unit takes."""
        return self.index.shape[1]

    @property
    def is_output(self) -> bool:
        """Whether a layer makes the channels here."""
        return self.role in ('out', 'both')

    @property
    def is_input(self) -> bool:
        """Whether a layer reads the channels here, so that zeros are a mask."""
        return self.role in ('in', 'both')


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

    def __repr__(self) -> str:
        members = f'{len(self.members)} members'
        return f'ChannelGroup({self.name}, {self.units} units, {members})'

    @property
    def units(self) -> int:
        """Number of units."""
        return self.members[0].index.shape[0]

    @property
    def internal(self) -> bool:
        """Whether one layer makes the channels and one other reads them (paper's -I).

        A group convolution does both, so its channels are never internal.
        """
        makers, readers = self.layers('out'), self.layers('in')
        return len(makers) == len(readers) == 1 and makers != readers

    def layers(self, role: Role) -> list[str]:
        """Return the names of the layers in which the units have ``role``.

        A role of ``'both'`` counts as ``'out'`` and as ``'in'``.
        """
        roles = {role, 'both'} if role in ('out', 'in') else {role}
        return [module_of(m.name) for m in self.members if m.role in roles]


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
class ResidualBlock:
    """A residual block: it returns its input where its branch puts out zero.

    Attributes:
        name: Name of its module.
        last: The norm, or the layer, in it whose weight and bias at zero make it so.

    Examples:
        >>> block = ResidualBlock('layer1.1', 'layer1.1.bn2')
        >>> block.holds('layer1.1.conv1.weight'), block.holds('layer1.10.bn2.weight')
        (True, False)
    """

    name: str
    last: str

    def holds(self, name: str) -> bool:
        """Return whether a tensor or a module of this name is inside of the block."""
        return name.startswith(f'{self.name}.')


@dataclass(frozen=True)
class Grouping:
    """All groups of a model, and the layers that are left out.

    Residual blocks that may go whole are units as well, each one by itself; their
    numbers come after those of the channels' units.

    Attributes:
        groups: Groups in the order in which data meets them.
        frozen: Layers with output channels that no unit can remove.
        inputs: For each layer's weight, the unit that each of its input channels
            belongs to, shape (C_in,), or -1. Units are numbered through all groups.
        blocks: Residual blocks that may go.

    Examples:
        >>> index = np.arange(8).reshape(4, 2)
        >>> group = ChannelGroup('conv', (Member('conv.weight', 0, index, 'out'),))
        >>> group.members[0]
        Member(conv.weight, dim 0, out, 4 units of 2)
        >>> Grouping((group,), (FrozenLayer('head', 'an output', 3),), {})
        Grouping(1 groups, 4 units, 1 frozen layers)
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenLayer, ...]
    inputs: dict[str, np.ndarray]
    blocks: tuple[ResidualBlock, ...] = ()

    def __repr__(self) -> str:
        parts = f'{len(self.groups)} groups, {self.units} units'
        parts += f', {len(self.blocks)} blocks' if self.blocks else ''
        return f'Grouping({parts}, {len(self.frozen)} frozen layers)'

    @property
    def units(self) -> int:
        """Number of units in all groups, and of blocks."""
        return sum(g.units for g in self.groups) + len(self.blocks)

    @property
    def group_of(self) -> np.ndarray:
        """Group number of each unit, shape (units,); those of blocks come last."""
        sizes = [*(g.units for g in self.groups), *(1 for _ in self.blocks)]
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def names(self) -> list[str]:
        """Names of the groups and, after them, of the blocks."""
        return [*(g.name for g in self.groups), *(b.name for b in self.blocks)]

    def blocks_among(self, units: np.ndarray) -> list[str]:
        """Return the names of the blocks among units, given by numbers or a mask."""
        chosen = np.zeros(self.units, dtype=bool)
        chosen[units] = True
        first = self.units - len(self.blocks)
        return [b.name for b, c in zip(self.blocks, chosen[first:], strict=True) if c]

    def groups_inside(self, block: ResidualBlock) -> list[int]:
        """Return the numbers of the groups that have no member outside of a block."""
        return [
            number
            for number, group in enumerate(self.groups)
            if all(block.holds(member.name) for member in group.members)
        ]

    def remaining(self, kept: np.ndarray) -> Grouping:
        """Return the groups of a model that keeps only the units ``kept``, (U,).

        Units are numbered anew; groups stay in order and keep some units each, but for
        those inside of blocks that are gone, which are gone as well.
        """
        removed = removed_entries(self.groups, kept)
        left = set(self.blocks_among(kept))
        gone = [block for block in self.blocks if block.name not in left]
        ends = np.cumsum([g.units for g in self.groups])
        groups = []
        for group, part in zip(self.groups, np.split(kept, ends)[:-1], strict=True):
            members = [m for m in group.members if not _is_inside(m.name, gone)]
            if members:
                rest = tuple(_remaining(m, removed, part) for m in members)
                groups.append(ChannelGroup(group.name, rest))
        # The last entry is for -1: an input channel of no unit stays one.
        number = np.append(np.cumsum(kept) - 1, -1)
        stays = np.append(kept, True)
        inputs = {
            name: number[index[stays[index]]]
            for name, index in self.inputs.items()
            if not _is_inside(name, gone)
        }
        blocks = tuple(block for block in self.blocks if block.name in left)
        return Grouping(tuple(groups), self.frozen, inputs, blocks)


def _is_inside(name: str, blocks: Sequence[ResidualBlock]) -> bool:
    return any(block.holds(name) for block in blocks)


def removed_entries(
    groups: Sequence[ChannelGroup], kept: np.ndarray
) -> dict[tuple[str, int], np.ndarray]:
    """Return the entries of each tensor's dimensions that belong to removed units.

    Args:
        groups: All groups of the model.
        kept: Units that are not removed, (U,).

    Returns:
        dict: Ascending entries by name and dimension, where there are any.

    Examples:
        >>> import numpy as np
        >>> pairs = Member('fc.weight', 1, np.array([[0, 1], [2, 3], [4, 5]]), 'in')
        >>> group = ChannelGroup('conv', (pairs,))
        >>> removed_entries([group], np.array([True, False, True]))
        {('fc.weight', 1): array([2, 3])}
    """
    removed: dict[tuple[str, int], list[np.ndarray]] = {}
    start = 0
    for group in groups:
        units = ~kept[start : start + group.units]
        start += group.units
        for member in group.members if units.any() else ():
            parts = removed.setdefault((member.name, member.dim), [])
            parts.append(member.index[units].reshape(-1))
    return {key: np.unique(np.concatenate(parts)) for key, parts in removed.items()}


def _remaining(
    member: Member, removed: Mapping[tuple[str, int], np.ndarray], kept: np.ndarray
) -> Member:
    """Return a member with the units ``kept`` of its group only.

    Args:
        member: The member.
        removed: What `removed_entries` gives for all groups.
        kept: Units of its group that are kept, (units,).
    """
    index = member.index[kept]
    before = removed.get((member.name, member.dim))
    if before is not None:  # each entry moves up by the removed ones before it
        index = index - np.searchsorted(before, index)
    return replace(member, index=index)


def module_of(tensor: str) -> str:
    """Return the name of the module that owns the tensor called ``tensor``."""
    return tensor.rpartition('.')[0]
