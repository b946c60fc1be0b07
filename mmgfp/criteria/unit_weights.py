"""Weights of a model by the unit that they belong to: what magnitude criteria share.

All weights that make a unit, in all layers that do, are taken as one vector, since they
can only go together: where a residual adds what two layers make, or a depth-wise
convolution scales what another one makes, one of them being small says little. So
measures that are sums over weights are added over the layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.criteria.base import Criterion, Reduce, Scores, ScoringContext
from mmgfp.groups import Member

#: Takes a part of all units' weights, (units, D), to what is added over the parts; the
#: first dimension of the result stands for the units.
Measure = Callable[[Tensor], Tensor]


class _Part(NamedTuple):
    """Weights of one parameter that belong to the units of a group.

    Attributes:
        name: Name of the parameter.
        dim: Its dimension that holds the units.
        entries: The entries of each unit, (units, entries per unit).
    """

    name: str
    dim: int
    entries: Tensor


class UnitWeights:
    """Finds the weights of each unit in the parameters of a model.

    Args:
        context: The model as it is now.
        is_part: Which members of a group count; by default those that make it.

    Attributes:
        names: Names of all parameters that count.
        groups_of: Numbers of the groups that each of them is a part of.
    """

    def __init__(
        self,
        context: ScoringContext,
        is_part: Callable[[Member], bool] = lambda member: member.is_output,
    ) -> None:
        self._count = len(context.group_of)
        self._model = context.model
        parameters = dict(context.model.named_parameters())
        sizes = [group.units for group in context.grouping.groups]
        self._numbers = np.split(context.numbers, np.cumsum(sizes)[:-1])  # by group
        self._parts = [
            [
                _Part(m.name, m.dim, _on_device_of(parameters[m.name], m.index))
                for m in group.members
                if m.name in parameters and is_part(m)
            ]
            for group in context.grouping.groups
        ]
        self.groups_of: dict[str, list[int]] = {}
        for g, parts in enumerate(self._parts):
            for part in parts:
                self.groups_of.setdefault(part.name, []).append(g)
        self.names = list(self.groups_of)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that count, by name."""
        every = dict(self._model.named_parameters())
        return {name: every[name] for name in self.names}

    def totals(
        self,
        tensors: Mapping[str, Tensor],
        measure: Measure,
        kept: np.ndarray | None = None,
    ) -> list[Tensor | None]:
        """Return the sums of a measure over the parts of each group.

        Args:
            tensors: Tensors of the shapes of the parameters, by name; parts without one
                add nothing.
            measure: What is added.
            kept: Units to look at, (U,); by default all that are in the model.

        Returns:
            list: Sums by group, one row for each of its units that are looked at; None
            for a group without any part.
        """
        result: list[Tensor | None] = []
        for numbers, parts in zip(self._numbers, self._parts, strict=True):
            chosen = None if kept is None else np.flatnonzero(kept[numbers])
            total: Tensor | None = None
            for name, dim, entries in parts:
                if name in tensors:
                    every = chosen is None or len(chosen) == len(entries)
                    rows = entries if every else entries[_on_device_of(entries, chosen)]
                    part = measure(_vectors(tensors[name], dim, rows))
                    total = part if total is None else total + part
            result.append(total)
        return result

    def of_units(
        self, values: Sequence[Tensor | None], kept: np.ndarray | None = None
    ) -> Tensor:
        """Return the values of all units that there were, (U,), in double precision.

        Args:
            values: A value for each unit by group, like `totals`; NaN stands for those
                of a group without and of units that were not looked at.
            kept: Units that were looked at, (U,).
        """
        known = [v for v in values if v is not None]
        numbers = [
            n if kept is None else n[kept[n]]
            for n, v in zip(self._numbers, values, strict=True)
            if v is not None
        ]
        device = next(self._model.parameters()).device
        result = torch.full((self._count,), np.nan, dtype=torch.float64, device=device)
        if known:
            index = torch.from_numpy(np.concatenate(numbers)).to(device)
            result[index] = torch.cat([v.double().to(device) for v in known])
        return result


class WeightCriterion(Criterion):
    """Scores units by their weights as they are when a decision is due.

    It has no hooks, and no state that a resumed run could lose. Units that are pruned
    for good count as gone, whether they are masked or cut. Those that may come back
    count: the layers that make them are not masked.
    """

    scores_pruned = True

    #: Why a group may have no score.
    why_unknown = 'has weights that are not finite'

    def __init__(self) -> None:
        self.weights: UnitWeights | None = None
        self._kept = np.zeros(0, dtype=bool)

    def attach(self, context: ScoringContext) -> None:
        """Find the weights of all units in the model as it is now."""
        self.weights = self.find_weights(context)
        self._kept = context.kept
        if context.aside is not None:
            self._kept = np.ones_like(context.kept)

    def find_weights(self, context: ScoringContext) -> UnitWeights:
        """Return the weights that count, by default those that make the units."""
        return UnitWeights(context)

    @abstractmethod
    def measure(self, vectors: Tensor) -> Tensor:
        """Return what is added over the layers that make the units of a group.

        Args:
            vectors: Weights of each unit in one of these layers, (units, D), of at
                least single precision.
        """

    def finish(self, total: Tensor) -> Tensor:
        """Return the scores of a group's units from the sum of `measure`, (units,)."""
        return total

    @torch.no_grad()
    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the scores of all units that are not gone, and NaN for others."""
        assert self.weights is not None, 'attach comes first'
        parameters = self.weights.parameters()
        totals = self.weights.totals(parameters, self.measure, self._kept)
        finished = [None if t is None else self.finish(t) for t in totals]
        values = self.weights.of_units(finished, self._kept)
        # Kernels of unlike devices differ in the last digits; decisions must not.
        processes = 1 if reduce is None else reduce(values)
        values = (values / processes).where(values.isfinite(), np.nan)
        return Scores(values.cpu().numpy(), why_unknown=self.why_unknown)


def _vectors(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the entries that ``index`` gives each unit as rows, (units, D)."""
    rows = tensor.detach().movedim(dim, 0)[index].flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _on_device_of(tensor: Tensor, index: np.ndarray | None) -> Tensor:
    return torch.from_numpy(index).to(tensor.device)
