"""The units of a model: those kept, those masked and those cut out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from mmgfp.config import PruningConfig
from mmgfp.criteria.base import ScoringContext
from mmgfp.groups import Grouping
from mmgfp.selection.costs import Cost, CostTable, LayerProfile, Totals
from mmgfp.selection.greedy import Limits, select_units
from mmgfp.selection.recovery import kept_after
from mmgfp.selection.schedules import DecisionPoint, Quota
from mmgfp.selection.targets import Target
from mmgfp.surgery.aside import ColumnsAside, load_values_aside
from mmgfp.surgery.blocks import block_mask
from mmgfp.surgery.live import compact_training_, units_to_keep_in_model
from mmgfp.surgery.masking import ColumnMask, check_not_masked
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.tracing import RowUse
from mmgfp.unit_limits import check_targets, limits_of
from mmgfp.utils.errors import ConfigError


class UnitState:
    """Units of a model and its copies: those kept, those masked, those cut out.

    Args:
        model: The unpruned model.
        grouping: Its groups.
        profiles: How often its layers use their weights, by the name of the weight.
        copies: Models that are masked and cut along with it, such as an averaged one.
        costs: Costs that need a profile, by their names in `COSTS`.
        recover: Whether pruned units may come back.

    Raises:
        ConfigError: If the model is being pruned already, or a profile is not of it.

    Residual blocks that may go are among the units, as groups of one unit each; they
    come after all others.

    Attributes:
        group_of: Group of each unit, (U,).
        sizes: Units of each group, (G,).
        widths: Channels of one unit of each group, (G,).
        costs: Costs for any number of units.
        full: Costs of the unpruned model.
        shapes: Shapes by name, of its tensors and of attributes that count channels.
        kept: Units that were not pruned, (U,).
        in_model: Units that are in the model, masked or not, (U,).
        remaining: Groups of the units that are in the model, numbered anew.
        masks: Masks of the model and of each copy.
    """

    def __init__(
        self,
        model: nn.Module,
        grouping: Grouping,
        profiles: Mapping[str, LayerProfile],
        copies: Sequence[nn.Module] = (),
        costs: Mapping[str, Cost] | None = None,
        recover: bool = False,
    ) -> None:
        check_not_masked(model)
        self.model = model
        self.grouping = self.remaining = grouping
        self.group_of = grouping.group_of
        self.sizes = np.bincount(self.group_of)
        self.widths = _widths(grouping)
        parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
        for cost in (costs or {}).values():
            cost.check_fits(parameters, profiles)
        self.costs = CostTable(
            parameters, profiles, grouping.groups, costs, grouping.blocks
        )
        self.full = self.costs.totals(np.zeros(self.costs.groups))
        self.kept = np.ones(grouping.units, dtype=bool)
        self.in_model = self.kept.copy()
        self.shapes = shapes_of(model)
        self._copies = list(copies)
        self._recover = recover
        self.masks: list[ColumnMask] = []
        self._mask_all()

    @property
    def removed(self) -> np.ndarray:
        """Units pruned from each group, (G,)."""
        return np.bincount(self.group_of[~self.kept], minlength=len(self.sizes))

    @property
    def totals(self) -> Totals:
        """Costs of the model without the pruned units."""
        return self.costs.totals(self.removed)

    def limits(
        self,
        config: PruningConfig,
        targets: Sequence[Target],
        kept: np.ndarray | None = None,
    ) -> Limits:
        """Return how far each group may shrink, which must be far enough.

        Args:
            config: The options of the run.
            targets: Targets to reach.
            kept: Units that an interrupted run had kept, (U,); all if None.

        Raises:
            ConfigError: If a target cannot be reached, or ratios are of other groups;
                all hooks are off then.
        """
        try:
            limits = limits_of(self, config)
            check_targets(self, targets, limits, config, kept)
        except ConfigError:
            self.close()
            raise
        return limits

    def structure(self) -> PruneStructure:
        """Return the kept entries of every tensor dimension of the unpruned model."""
        return self._structure(self.kept)

    def in_model_structure(self) -> PruneStructure:
        """Return the entries of the unpruned model that were not cut out yet."""
        return self._structure(self.in_model)

    def _structure(self, kept: np.ndarray) -> PruneStructure:
        gone = self.grouping.blocks_among(~kept)
        return PruneStructure.of(self.grouping.groups, kept, self.shapes, gone)

    def remaining_structure(self, stay: np.ndarray) -> PruneStructure:
        """Return the entries that units, (U,), take of the model as it is now."""
        groups, kept = self.remaining.groups, stay[self.in_model]
        gone = self.remaining.blocks_among(~kept)
        return PruneStructure.of(groups, kept, shapes_of(self.model), gone)

    def track_copy(self, copied: nn.Module) -> None:
        """Mask and cut a copy along with the model.

        Args:
            copied: A module with tensors of the same names and shapes.
        """
        self._copies.append(copied)
        self.masks.append(self._mask(copied))

    def select(
        self, point: DecisionPoint, quota: Quota, limits: Limits, normalize: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the units that a decision takes, (V,), and brings back.

        Args:
            point: The state of the run, with the importance of all units.
            quota: How much the decision may take.
            limits: How far each group may shrink.
            normalize: The cost that importance is divided by, or ``'none'``.
        """
        gone = select_units(
            point.importance,
            self.group_of,
            self.kept,
            self.costs,
            limits,
            normalize,
            lambda now: quota.is_met(now, point),
            quota.units,
            quota.importance,
        )
        if not self._recover or not len(gone):
            return gone, gone[:0]
        model = (self.group_of, self.costs, limits, normalize)
        kept = kept_after(gone, point, *model)
        return np.flatnonzero(self.kept & ~kept), np.flatnonzero(~self.kept & kept)

    def prune(self, units: np.ndarray, back: Sequence[int] | np.ndarray = ()) -> None:
        """Mask units in the model and its copies, and let others come back.

        Args:
            units: Numbers of the units to mask.
            back: Numbers of masked units that are kept again, as they were.
        """
        self.kept[units] = False
        self.kept[np.asarray(back, dtype=int)] = True
        for mask in self.masks:
            mask.update(self.kept[self.in_model])

    def compact_(self, optimizers: Sequence[Optimizer] = ()) -> bool:
        """Cut masked units out of the model, except a few (`units_to_keep_in_model`).

        Args:
            optimizers: Those that train the model.

        Returns:
            bool: Whether there was anything to cut.

        Raises:
            ConfigError: If an optimizer's state cannot be cut; nothing has changed.
        """
        stay = units_to_keep_in_model(
            self.kept, self.in_model, self.group_of, self.widths
        )
        return self._cut(stay, optimizers)

    def restore(
        self,
        kept: np.ndarray,
        in_model: np.ndarray,
        optimizers: Sequence[Optimizer] = (),
        aside: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Bring an unpruned model to the state of an interrupted run.

        Args:
            kept: Units that were kept there, (U,).
            in_model: Units that were in the model there, (U,).
            optimizers: Those that train the model.
            aside: What `values_aside` gave there.

        Raises:
            ConfigError: If an optimizer's state cannot be cut; nothing has changed. Or
                if columns kept aside are of another model.
        """
        self._cut(in_model, optimizers)  # first, as it changes nothing if it fails
        self.prune(np.flatnonzero(~kept))
        load_values_aside(self.asides, aside)

    @property
    def asides(self) -> list[ColumnsAside | None]:
        """Columns kept aside, of the model and of each copy; None without returns."""
        return [mask.aside for mask in self.masks]

    def _cut(self, stay: np.ndarray, optimizers: Sequence[Optimizer]) -> bool:
        if np.array_equal(stay, self.in_model):
            return False
        structure = self.remaining_structure(stay)
        compact_training_(self.model, structure, optimizers, self._copies)
        self.close()  # the masks hold on to parameters that are gone
        self.in_model = stay.copy()
        self.remaining = self.grouping.remaining(stay)
        self._mask_all()
        return True

    def _mask_all(self) -> None:
        self.masks = [self._mask(model) for model in (self.model, *self._copies)]

    def _mask(self, model: nn.Module) -> ColumnMask:
        blocks = [block_mask(model, block) for block in self.remaining.blocks]
        groups = [*self.remaining.groups, *blocks]
        mask = ColumnMask(model, groups, self._recover)
        mask.update(self.kept[self.in_model])
        return mask

    def close(self) -> None:
        """Take the masks' hooks off the models; masked columns stay at zero."""
        for mask in self.masks:
            mask.remove()


def _widths(grouping: Grouping) -> np.ndarray:
    """Return the channels of one unit of each group, (G,); 1 for blocks."""
    outputs = [
        next(m.width for m in group.members if m.is_output) for group in grouping.groups
    ]
    return np.array([*outputs, *(1 for _ in grouping.blocks)])


def scoring_context(units: UnitState, rows: RowUse) -> ScoringContext:
    """Return the model of some units as it is now, as criteria see it.

    Args:
        units: The units.
        rows: Which layers read images and which RoIs.
    """
    in_model = (units.remaining, np.flatnonzero(units.in_model), units.group_of)
    aside = units.asides[0]
    return ScoringContext(units.model, *in_model, rows, units.kept, aside)
