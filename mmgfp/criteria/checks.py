"""Warnings about scores that say little, and an end to runs without any."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mmgfp.criteria.base import Scores
from mmgfp.groups import Grouping
from mmgfp.utils.errors import ConfigError, StatisticsError

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

    def check(
        self, scores: Scores, grouping: Grouping, kept: np.ndarray, interval: int
    ) -> None:
        """Warn of groups without scores; stop if no iteration counts.

        Args:
            scores: The scores of all units.
            grouping: Their groups.
            kept: Units not pruned yet, (U,).
            interval: Iterations since the last decision.

        Raises:
            ConfigError: If a criterion returns anything but a score for each unit.
            StatisticsError: If too many iterations in a row had gradients that are not
                finite, or no group can ever be scored.
        """
        _check_values(scores, kept.shape)
        self._check_gradients(scores)
        unseen = unscored_groups(scores.values, grouping, kept)
        groups = len(grouping.names)
        if len(unseen) == groups and scores.nonfinite_in_row:
            return  # the reason has been given
        if len(unseen) == groups and scores.why_unknown:
            raise StatisticsError(
                'criterion',
                'one that can score some group of channels',
                f'none, as each one {scores.why_unknown}',
                'choose another criterion',
            )
        why = f'got no gradient in {interval} iterations'
        why = f'{why} and is left alone until it does'
        if scores.why_unknown:
            why = f'{scores.why_unknown} and is left alone'
        for name in unseen:
            self._warn_once(f'group {name} {why}')

    def _check_gradients(self, scores: Scores) -> None:
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
            # One text for each number: MMEngine's log drops texts that it has seen.
            logger.warning(
                f'gradients were not finite in {scores.nonfinite} iterations so far, '
                f'which do not count'
            )

    def warn_of_nothing_to_prune(self, scores: Scores, kept: np.ndarray) -> None:
        """Say why a decision took nothing although the schedule asked for it.

        Args:
            scores: The scores of all units.
            kept: Units not pruned yet, (U,).
        """
        if np.isfinite(scores.values[kept]).any():
            why = (
                'units with a finite score may not go; see min_channels, max_ratio, '
                'ratios, divisor and keep'
            )
        elif scores.nonfinite_in_row:
            return  # the reason has been given
        else:
            why = (
                f'none of the {kept.sum()} that are left has a finite score of the '
                f'criterion (NaN: nothing is known, infinity: it never goes)'
            )
        self._warn_once(f'no unit was pruned: {why}')

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


def unscored_groups(
    values: np.ndarray, grouping: Grouping, kept: np.ndarray
) -> list[str]:
    """Return the names of groups that are left, of which no unit has a score.

    Args:
        values: Importance of each unit, (U,); NaN where nothing is known.
        grouping: The groups.
        kept: Units that are left, (U,).
    """
    names, group_of = grouping.names, grouping.group_of
    known = kept & ~np.isnan(values)
    has_kept = np.bincount(group_of[kept], minlength=len(names)) > 0
    has_known = np.bincount(group_of[known], minlength=len(names)) > 0
    return [names[g] for g in np.flatnonzero(has_kept & ~has_known)]


def _check_values(scores: Any, shape: tuple[int, ...]) -> None:
    """Raise a ConfigError if a criterion returns anything but a score for each unit."""
    values: Any = getattr(scores, 'values', None)
    is_array = isinstance(scores, Scores) and isinstance(values, np.ndarray)
    if not is_array or values.shape != shape or (values < 0).any():
        got = f'{type(scores).__name__} with {type(values).__name__}'
        if is_array:
            negative = int((values < 0).sum())
            got = f'shape {values.shape}, {negative} of them negative'
        raise ConfigError(
            'scores of the criterion',
            f'Scores with an array of {shape[0]} values, none of them negative',
            got,
            'give each unit that there was a score, or NaN',
        )
