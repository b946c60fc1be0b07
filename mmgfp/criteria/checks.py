"""Warnings about scores that say little, and an end to runs without any."""

from __future__ import annotations

import logging

import numpy as np

from mmgfp.criteria.base import Scores
from mmgfp.groups import Grouping
from mmgfp.utils.errors import StatisticsError

logger = logging.getLogger('mmgfp')


class ScoreChecks:
    """Looks at the scores of a run, decision by decision, and warns once of each fault.

    Args:
        max_nonfinite: Iterations in a row with gradients that are not finite, after
            which it is an error.
    """

    def __init__(self, max_nonfinite: int) -> None:
        self._max_nonfinite = max_nonfinite
        self._nonfinite = 0
        self.warned: set[str] = set()

    def check(self, scores: Scores, grouping: Grouping, interval: int) -> None:
        """Warn of groups without gradients; stop if no iteration counts.

        Args:
            scores: The scores of all units.
            grouping: Their groups.
            interval: Iterations since the last decision.

        Raises:
            StatisticsError: If too many iterations in a row had gradients that are not
                finite.
        """
        if scores.nonfinite_in_row >= self._max_nonfinite:
            raise StatisticsError(
                'gradients',
                'finite ones',
                f'NaN or infinity in the last {scores.nonfinite_in_row} iterations',
                'look at the loss, lower the learning rate or clip gradients; '
                'max_nonfinite sets how many are tolerated',
            )
        if scores.nonfinite > self._nonfinite:
            self._nonfinite = scores.nonfinite
            logger.warning(
                'gradients were not finite in %d iterations so far, which do not count',
                scores.nonfinite,
            )
        unseen = np.unique(grouping.group_of[np.isnan(scores.values)])
        if len(unseen) == len(grouping.groups) and scores.nonfinite_in_row:
            return  # the reason has been given
        for g in unseen:
            message = (
                f'group {grouping.groups[g].name} got no gradient in {interval} '
                f'iterations and is left alone until it does'
            )
            if message not in self.warned:
                self.warned.add(message)
                logger.warning(message)
