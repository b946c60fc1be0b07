"""Groups that are too narrow for the divisor, so that they keep all channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mmgfp.selection.greedy import Limits
from mmgfp.utils.words import listed

if TYPE_CHECKING:  # groups are made from tensors; here they are numbers only
    from mmgfp.groups import Grouping
    from mmgfp.surgery.structure import PruneStructure


@dataclass(frozen=True)
class NarrowGroups:
    """Groups that stay whole because of the divisor, not of another limit.

    Attributes:
        divisor: What numbers of channels are multiples of at rest.
        names: Names of the groups; none if the divisor holds back none.

    Examples:
        >>> NarrowGroups(8, ('stem', 'head')).text.partition(';')[0]
        '2 groups are too narrow to lose channels under divisor=8: stem, head'
    """

    divisor: int
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, limits: Limits, grouping: Grouping, kept: np.ndarray | None = None
    ) -> NarrowGroups:
        """Return the groups of a model that its limits would let shrink otherwise.

        Args:
            limits: How far each group may shrink.
            grouping: The groups of the unpruned model.
            kept: Which units are left, (U,): groups that went with a residual block
                are not named. All of them if None.
        """
        units = np.bincount(grouping.group_of)
        is_held = (limits.smallest(units) == units) & (limits.least < units)
        if kept is not None:
            is_held &= np.bincount(grouping.group_of, kept) > 0
        names = tuple(grouping.names[g] for g in np.flatnonzero(is_held))
        return cls(limits.divisor, names)

    def left_in(
        self, structure: PruneStructure, members: Mapping[str, Iterable[str]]
    ) -> NarrowGroups:
        """Return those that are in modules which a model has not lost whole.

        Args:
            structure: The structure of the model.
            members: Names of the tensors of each group, by its name.
        """
        left = (
            name
            for name in self.names
            if not all(map(structure.is_gone, members.get(name, [f'{name}.weight'])))
        )
        return replace(self, names=tuple(left))

    @property
    def text(self) -> str:
        """A line for people, with the remedy; empty if there are no such groups."""
        count = len(self.names)
        if not count:
            return ''
        groups, them = ('group is', 'it') if count == 1 else ('groups are', 'them')
        return (
            f'{count} {groups} too narrow to lose channels under divisor='
            f'{self.divisor}: {listed(self.names)}; a smaller '
            f'divisor lets {them}, divisor=1 in any case'
        )
