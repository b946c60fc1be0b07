"""Costs of a model as arithmetic on the sizes of its parameters.

A cost is a class that counts what every parameter contributes for one image (paper,
section 3.3). Targets, normalisation, logs, tables and artifacts go through `COSTS`, so
that registering a class is all it takes to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mmgfp.utils.registry import Registry

if TYPE_CHECKING:  # groups are made from tensors; here they are numbers only
    from mmgfp.groups import ChannelGroup, ResidualBlock


@dataclass(frozen=True)
class LayerProfile:
    """The number of times that a layer uses its weight for one image.

    Attributes:
        macs_positions: How often each weight element is used: output positions of a
            convolution, input positions of a transposed one, rows of an FC layer.
        out_positions: Elements put out per output channel.
        out_dim: The weight's dimension that holds the output channels.
    """

    macs_positions: float
    out_positions: float
    out_dim: int = 0


@dataclass(eq=False)  # not frozen, which takes longer to build in each pick
class TensorSizes:
    """Sizes of R parameters at given widths, and how often layers use them.

    Attributes:
        names: Names of the parameters, (R,).
        shapes: Their sizes, filled up with ones, (R, D).
        out_dim: The dimension that holds a layer's output channels, (R,).
        macs_positions: See `LayerProfile`; 0 for what is no layer's weight, (R,).
        out_positions: Likewise, (R,).
        elements: Numbers of elements, (R,).
        outputs: Numbers of output channels, (R,).
    """

    names: np.ndarray
    shapes: np.ndarray
    out_dim: np.ndarray
    macs_positions: np.ndarray
    out_positions: np.ndarray

    elements: np.ndarray = field(init=False)
    outputs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.elements = self.shapes.prod(1)
        self.outputs = self.shapes[np.arange(len(self.shapes)), self.out_dim]


class Cost(ABC):
    """Something that a model uses up, which pruning can save.

    Attributes:
        label: Name in tables and logs.
        unit: Unit in tables and logs, after division by ``scale``.
        scale: Divisor from the plain count to ``unit``.
        is_target: Whether ``target=dict(name=ratio)`` may ask for it.
        is_normalizer: Whether importance may be divided by it.
        from_profile: Whether it has to be measured first: it counts in runs that are
            given a profile only.

    Examples:
        A cost for models whose weights are sent over a network as bytes:

        >>> import numpy as np
        >>> class WeightBytes(Cost):
        ...     label, unit, scale = 'weights', 'KB', 1e3
        ...     def count(self, sizes):
        ...         return 4 * sizes.elements
        >>> one = TensorSizes(*map(np.array, (['w'], [[2, 3]], [0], [0], [0])))
        >>> WeightBytes().count(one).tolist()
        [24]
    """

    label: str = ''
    unit: ClassVar[str] = ''
    scale: ClassVar[float] = 1.0
    is_target: ClassVar[bool] = True
    is_normalizer: ClassVar[bool] = True
    from_profile: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if not cls.label:
            raise TypeError(
                f'cost {cls.__name__} must have a label for tables and logs'
            )

    @abstractmethod
    def count(self, sizes: TensorSizes) -> np.ndarray:
        """Return what each parameter costs for one image, (R,).

        It must not depend on other parameters than the row's own: a decision counts
        those rows anew that a removal has changed.
        """

    def check_fits(  # noqa: B027 - most fit any model
        self,
        shapes: Mapping[str, Sequence[int]],
        profiles: Mapping[str, LayerProfile],
    ) -> None:
        """Refuse a model that the cost was not made for.

        Args:
            shapes: Shapes of the model's parameters by name.
            profiles: How often its layers use their weights.

        Raises:
            ConfigError: If it was made for another one.
        """

    def count_smoothly(self, sizes: TensorSizes) -> np.ndarray:
        """Return what savings are taken from, (R,): by default the same as `count`.

        A cost that falls in steps gives its slope here, or a unit would save nothing
        until the last one of a step, and all others would go before it.
        """
        return self.count(sizes)


#: Costs by name.
COSTS: Registry[Cost] = Registry('cost', 'mmgfp.selection')


@COSTS.register('macs', 'flops')
class MACs(Cost):
    """Multiply-accumulates: one fused multiply-add counts as one."""

    label, unit, scale = 'MACs', 'G', 1e9

    def count(self, sizes: TensorSizes) -> np.ndarray:
        """Return weight elements times the positions that use them, (R,)."""
        return sizes.elements * sizes.macs_positions


@COSTS.register('memory')
class Memory(Cost):
    """Number of elements that all convolutions and FC layers put out."""

    label, unit, scale = 'memory', 'M', 1e6

    def count(self, sizes: TensorSizes) -> np.ndarray:
        """Return output channels times output positions, (R,)."""
        return sizes.outputs * sizes.out_positions


@COSTS.register('params')
class Params(Cost):
    """Number of elements of all parameters."""

    label, unit, scale = 'params', 'M', 1e6

    def count(self, sizes: TensorSizes) -> np.ndarray:
        """Return the number of elements, (R,)."""
        return sizes.elements


@dataclass(frozen=True)
class Totals:
    """Costs of a whole model.

    Attributes:
        values: The costs by their first name in `COSTS`.
    """

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        """Return the cost called ``name``; ``flops`` is the field's word for MACs."""
        return self.values[name if name in self.values else COSTS.canonical(name)]

    def ratio(self, name: str, full: Totals) -> float:
        """Return the share of another model's cost called ``name``; 1 if that is 0."""
        return self[name] / full[name] if full[name] else 1.0


class CostTable:
    """Costs for any number of units removed from each group.

    Residual blocks that may go count as groups of one unit, after all others.

    Args:
        shapes: Shapes of all parameters by name.
        profiles: How often layers use their weights, by the name of the weight.
        groups: The groups; with the blocks, G.
        costs: Costs that need a profile, by their names in `COSTS`.
        blocks: Residual blocks, which take all of their parameters along.

    Examples:
        >>> table = CostTable({'fc': (3, 5)}, {'fc': LayerProfile(1, 1)}, ())
        >>> table.totals(np.zeros(0))['macs']
        15.0
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        profiles: Mapping[str, LayerProfile],
        groups: Sequence[ChannelGroup],
        costs: Mapping[str, Cost] | None = None,
        blocks: Sequence[ResidualBlock] = (),
    ) -> None:
        plain = [name for name in COSTS.names() if not COSTS[name].from_profile]
        self.counters = {name: COSTS[name]() for name in plain} | dict(costs or {})  # K
        own = (type(cost).count_smoothly for cost in self.counters.values())
        self.has_steps = any(count is not Cost.count_smoothly for count in own)
        self.names = np.array(list(shapes), dtype=object)
        row = {name: i for i, name in enumerate(shapes)}
        rank = max((len(s) for s in shapes.values()), default=0)
        self.sizes = np.ones((len(row), rank))  # (T, D)
        for name, shape in shapes.items():
            self.sizes[row[name], : len(shape)] = shape
        self.macs_positions = np.zeros(len(row))  # (T,)
        self.out_positions = np.zeros(len(row))  # (T,)
        self.out_dims = np.zeros(len(row), dtype=int)  # (T,)
        for name, profile in profiles.items():
            self.macs_positions[row[name]] = profile.macs_positions
            self.out_positions[row[name]] = profile.out_positions
            self.out_dims[row[name]] = profile.out_dim
        # What one unit takes off each tensor, for the pairs P of a group and a tensor.
        removal: dict[tuple[int, int], np.ndarray] = {}
        for g, group in enumerate(groups):
            for member in group.members:
                if member.name in row:
                    pair = removal.setdefault((g, row[member.name]), np.zeros(rank))
                    pair[member.dim] += member.width
        self.groups = len(groups) + len(blocks)
        self.tensors_of = {  # those that go with a block, by its number
            len(groups) + b: np.flatnonzero([block.holds(name) for name in shapes])
            for b, block in enumerate(blocks)
        }
        self.group_of = np.array([g for g, _ in removal], dtype=int)  # (P,)
        self.tensor_of = np.array([t for _, t in removal], dtype=int)  # (P,)
        self.removal = np.array([*removal.values()]).reshape(-1, rank)  # (P, D)

        # Which pairs change when a group shrinks: those of its tensors.
        self.pairs_of = [np.flatnonzero(self.group_of == g) for g in range(self.groups)]
        self.touched_by = [
            np.flatnonzero(np.isin(self.tensor_of, self.tensor_of[pairs]))
            for pairs in self.pairs_of
        ]

    def totals(self, removed: np.ndarray) -> Totals:
        """Return the costs without ``removed`` units of each group, (G,)."""
        counts = self.count(self.sizes_without(removed), slice(None))
        counts[:, ~self.tensors_without(removed)] = 0
        return self.sum(counts)

    def sum(self, counts: np.ndarray) -> Totals:
        """Return the totals of what `count` gave for all tensors."""
        return Totals(dict(zip(self.counters, counts.sum(1).tolist(), strict=True)))

    def sizes_without(self, removed: np.ndarray) -> np.ndarray:
        """Return the sizes of all tensors without the ``removed`` units, (T, D)."""
        sizes = self.sizes.copy()
        gone = np.asarray(removed)[self.group_of, None] * self.removal
        np.subtract.at(sizes, self.tensor_of, gone)
        return sizes

    def tensors_without(self, removed: np.ndarray) -> np.ndarray:
        """Return which tensors are in no block among the ``removed`` units, (T,)."""
        left = np.ones(len(self.sizes), dtype=bool)
        for group, tensors in self.tensors_of.items():
            left[tensors] &= not removed[group]
        return left

    def count(self, sizes: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """Return all costs of the tensors ``rows`` at ``sizes`` (R, D), (K, R)."""
        tensors = self._tensors(sizes, rows)
        return np.array([cost.count(tensors) for cost in self.counters.values()])

    def count_smoothly(self, sizes: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """Return what savings are taken from, like `count`, (K, R)."""
        if not self.has_steps:
            return self.count(sizes, rows)
        tensors = self._tensors(sizes, rows)
        counters = self.counters.values()
        return np.array([cost.count_smoothly(tensors) for cost in counters])

    def _tensors(self, sizes: np.ndarray, rows: np.ndarray | slice) -> TensorSizes:
        return TensorSizes(
            self.names[rows],
            sizes,
            self.out_dims[rows],
            self.macs_positions[rows],
            self.out_positions[rows],
        )


class RunningCosts:
    """Costs that follow a model as it shrinks, worked out anew where it did only.

    Args:
        table: The model's costs.
        removed: Units gone from each group, (G,).
        step: Units that go next from each group, for its savings, (G,); one of each
            by default.
    """

    def __init__(
        self, table: CostTable, removed: np.ndarray, step: np.ndarray | None = None
    ) -> None:
        self.table = table
        self._step = np.ones(table.groups) if step is None else step.astype(float)
        self._sizes = table.sizes_without(removed)  # (T, D)
        self._counts = table.count(self._sizes, slice(None))  # (K, T)
        self._levels = self._counts  # what savings are taken from, (K, T)
        if table.has_steps:
            self._levels = table.count_smoothly(self._sizes, slice(None))
        self._left = table.tensors_without(removed)  # (T,)
        for counts in (self._counts, self._levels):
            counts[:, ~self._left] = 0
        self._saved = self._savings_of(slice(None))  # (K, P)

    @property
    def totals(self) -> Totals:
        """Costs of the remaining model."""
        return self.table.sum(self._counts)

    def savings(self, cost: str) -> np.ndarray:
        """Return how much of a cost the next units of each group save, (G,).

        Args:
            cost: A name in `COSTS`.
        """
        table, row = self.table, list(self.table.counters).index(COSTS.canonical(cost))
        saved = np.bincount(table.group_of, self._saved[row], table.groups)
        for group, tensors in table.tensors_of.items():
            saved[group] = self._levels[row, tensors].sum()
        return saved

    def remove(self, group: int, units: int, step: int = 1) -> None:
        """Take ``units`` off a group; then ``step`` would go next."""
        if group in self.table.tensors_of:
            self._remove_block(group)
            return
        table, pairs = self.table, self.table.pairs_of[group]
        tensors = table.tensor_of[pairs]
        self._sizes[tensors] -= units * table.removal[pairs]
        counts = table.count(self._sizes[tensors], tensors)
        self._counts[:, tensors] = np.where(self._left[tensors], counts, 0)
        if table.has_steps:
            levels = table.count_smoothly(self._sizes[tensors], tensors)
            self._levels[:, tensors] = np.where(self._left[tensors], levels, 0)
        self._step[group] = step
        touched = table.touched_by[group]
        self._saved[:, touched] = self._savings_of(touched)

    def _remove_block(self, group: int) -> None:
        tensors = self.table.tensors_of[group]
        self._left[tensors] = False
        self._counts[:, tensors] = self._levels[:, tensors] = 0
        self._saved[:, np.isin(self.table.tensor_of, tensors)] = 0

    def _savings_of(self, pairs: np.ndarray | slice) -> np.ndarray:
        """Return what the next units of a pair's group take off its tensor, (K, R)."""
        table = self.table
        tensors = table.tensor_of[pairs]
        gone = self._step[table.group_of[pairs], None] * table.removal[pairs]
        rest = table.count_smoothly(self._sizes[tensors] - gone, tensors)
        return np.where(self._left[tensors], self._levels[:, tensors] - rest, 0)
