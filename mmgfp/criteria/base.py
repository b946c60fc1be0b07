"""The interface between a pruner and what it judges units by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmgfp.groups import Grouping
from mmgfp.surgery.aside import ColumnsAside
from mmgfp.tracing import RowUse
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import Registry

#: Sums a flat tensor over all processes, in place, and says how many there are.
Reduce = Callable[[Tensor], int]


@dataclass(frozen=True)
class ScoringContext:
    """The model that a criterion watches, as it is now.

    Units keep their first numbers when others are cut out of the model. Residual blocks
    that may go are units as well; their numbers are the last ones.

    Attributes:
        model: The module.
        grouping: Groups of the units that are in the model, numbered anew.
        numbers: The first number of each of these units, (U',).
        group_of: Group of every unit that there was, (U,).
        rows: Which layers read images and which RoIs.
        kept: Units that are not pruned, (U,); it follows the decisions. Of the units in
            the model, some may be masked until they are cut.
        aside: Columns of pruned units that may come back, which are scored as well;
            None where units are pruned for good.
    """

    model: nn.Module
    grouping: Grouping
    numbers: np.ndarray
    group_of: np.ndarray
    rows: RowUse
    kept: np.ndarray
    aside: ColumnsAside | None = None


@dataclass(frozen=True)
class Scores:
    """The importance of units, of all processes together.

    Attributes:
        values: Importance of each unit, (U,); NaN where nothing is known.
        nonfinite: Iterations so far that do not count, as their gradients were not
            finite.
        nonfinite_in_row: How many of them were the last ones; of several processes,
            the mean, rounded up.
        why_unknown: What a group has, or lacks, all of whose values are NaN, if no
            further iteration can change that.
    """

    values: np.ndarray
    nonfinite: int = 0
    nonfinite_in_row: int = 0
    why_unknown: str = ''


class Criterion(ABC):
    """Says how much the loss depends on each unit.

    The pruner calls `unscorable` once, before groups are made; `attach` once they are
    known, again after each cut of the model, and after a copy was made; then `watch`
    before and `update` after each iteration, and at each decision `scores` and `reset`.
    A class of your own is registered with ``@CRITERIA.register('name')`` and asked for
    by ``criterion='name'`` or ``criterion=dict(type='name', ...)``.

    Attributes:
        additive: Whether the scores of several units, added up, estimate what removing
            them together costs, in the unit of the loss or its square. Only then
            ``units_per_step='auto'`` is meaningful.
        scores_pruned: Whether pruned units that may come back are scored like kept
            ones, NaN where that is not possible; `recover` is refused otherwise.
        needs_gradients: Whether groups that the loss does not depend on have no score.
        scores_blocks: Whether residual blocks, which come after the units of all
            groups, are scored on the same scale (``blocks=True``).

    Examples:
        Every unit is worth as much as the others of its group, by its position:

        >>> class Position(Criterion):
        ...     def attach(self, context):
        ...         self.group_of = context.group_of
        ...     def scores(self, reduce=None):
        ...         return Scores(np.arange(len(self.group_of), dtype=float))
    """

    additive: bool = False
    scores_pruned: bool = False
    needs_gradients: bool = False
    scores_blocks: bool = False

    def unscorable(
        self, model: nn.Module, weights: Sequence[str], rows: RowUse
    ) -> Mapping[str, str]:
        """Return layers whose inputs cannot be scored, and why; they stay as they are.

        Args:
            model: The module.
            weights: Names of the weights of all layers that were traced.
            rows: Which layers read images and which RoIs.

        Returns:
            Mapping: Reasons by the name of the weight.
        """
        return {}

    @abstractmethod
    def attach(self, context: ScoringContext) -> None:
        """Start to watch a model, or go on with it after a cut."""

    def detach(self) -> None:  # noqa: B027
        """Take every trace off the model, if any is on it; `attach` goes on."""

    def watch(self, active: bool) -> None:  # noqa: B027
        """Say whether the next iteration counts; where not, it must cost nothing."""

    def update(self, loss_scale: float = 1.0) -> None:  # noqa: B027
        """Take in an iteration, after backward and the optimizer's step.

        Args:
            loss_scale: What the loss was multiplied with before backward.
        """

    @abstractmethod
    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the importance of all units since the last `reset`.

        Args:
            reduce: Sums over processes; None where there is only one.
        """

    def reset(self) -> None:  # noqa: B027
        """Start anew, as after a decision."""

    def gather(self, reduce: Reduce | None, keep: bool) -> None:  # noqa: B027
        """Let one process hold what all have gathered, before it is saved.

        Args:
            reduce: Sums over processes; None where there is only one.
            keep: Whether this process is the one; the others forget what they have.
        """

    def clear(self) -> None:  # noqa: B027
        """Forget everything, since another process resumes with the state of all."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to go on, in plain types and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on where `state_dict` was taken; called after `attach`.

        Raises:
            ConfigError: If the state does not belong to these units.
        """


#: Criteria by name; those of this package are registered by their modules.
CRITERIA: Registry[Criterion] = Registry('criterion', 'mmgfp.criteria')


def check_scores_blocks(criterion: Criterion, given: object, scope: str) -> None:
    """Refuse options of a run that leave residual blocks without a score to go by.

    Args:
        criterion: The criterion of the run.
        given: How it was asked for.
        scope: ``'global'`` or ``'local'``.

    Raises:
        ConfigError: If there are any.
    """
    if not criterion.scores_blocks:
        raise ConfigError(
            'criterion',
            'one that scores residual blocks where blocks is True',
            repr(given),
            "use 'fisher' or 'taylor' of gates, or drop blocks",
        )
    if scope == 'local':
        raise ConfigError(
            'scope',
            "'global' where blocks is True, as they compete with units of all groups",
            repr(scope),
            'drop one of them',
        )
