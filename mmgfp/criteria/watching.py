"""Criteria that add up what they see of a model that trains."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmgfp.criteria.base import Criterion, Reduce, ScoringContext
from mmgfp.criteria.statistics import UnitStatistics

logger = logging.getLogger('mmgfp')


class Watcher(Protocol):
    """Takes something off a model in each iteration, by hooks."""

    def attach(self, context: ScoringContext, device: torch.device) -> None:
        """Put the hooks on, for the model as it is now."""

    def detach(self) -> None:
        """Take the hooks off; `attach` goes on."""

    def watch(self, active: bool) -> None:
        """Say whether the next iteration counts."""

    def take(self, loss_scale: float) -> tuple[Tensor, np.ndarray] | None:
        """Return what came since the last call, and groups of which a part is missing.

        Args:
            loss_scale: What the loss was multiplied with before backward.

        Returns:
            tuple: Rows (R, U) of double precision, and the groups' numbers; None if
            nothing came.
        """

    def take_warnings(self) -> list[str]:
        """Return what is to be said of the iterations since the last call."""


class WatchingCriterion(Criterion):
    """Adds up a value of each unit over the iterations from one decision to the next.

    Args:
        watcher: Takes off the model what the values are made of.

    Attributes:
        watcher: The same.
        statistics: The sums since the last decision.
        warned: Warnings that were given, each one once.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.statistics = UnitStatistics(np.zeros(0, dtype=int))
        self.warned: set[str] = set()
        self._group_of: np.ndarray | None = None

    @abstractmethod
    def values(self, rows: Tensor) -> Tensor:
        """Return the values of one iteration, not negative, (U,).

        Args:
            rows: What the watcher took, (R, U).
        """

    def statistics_groups(self, group_of: np.ndarray) -> np.ndarray:
        """Return the group of each value, as several belong to a unit in some classes.

        Args:
            group_of: Group of each unit, (U,).
        """
        return group_of

    def attach(self, context: ScoringContext) -> None:
        """Watch the model; sums of earlier iterations stay."""
        if self._group_of is not context.group_of:  # other units
            device = next(context.model.parameters()).device
            groups = self.statistics_groups(context.group_of)
            self.statistics = UnitStatistics(groups, device)
            self._group_of = context.group_of
        self.watcher.attach(context, self.statistics.device)

    def detach(self) -> None:
        """Take the hooks off the model."""
        self.watcher.detach()

    def watch(self, active: bool) -> None:
        """Let the next iteration count, or not."""
        self.watcher.watch(active)

    def update(self, loss_scale: float = 1.0) -> None:
        """Add the values of one iteration."""
        taken = self.watcher.take(loss_scale)
        for message in self.watcher.take_warnings():
            if message not in self.warned:
                self.warned.add(message)
                logger.warning(message)
        if taken is not None:
            rows, unseen = taken
            self.statistics.add(self.values(rows), unseen)

    def reset(self) -> None:
        """Start the sums anew; iterations that did not count still do."""
        self.statistics.reset()

    def gather(self, reduce: Reduce | None, keep: bool) -> None:
        """Let one process hold the sums of all."""
        self.statistics.gather(reduce, keep)

    def clear(self) -> None:
        """Forget the sums."""
        self.statistics.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums by name."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with sums that were saved.

        Raises:
            ConfigError: If they are of other units.
        """
        self.statistics.load_state_dict(state)
