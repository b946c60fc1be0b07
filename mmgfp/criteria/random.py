"""Units in random order, which any other criterion has to beat."""

from __future__ import annotations

import numpy as np

from mmgfp.criteria.base import CRITERIA, Criterion, Reduce, Scores, ScoringContext
from mmgfp.utils.validation import check_count


@CRITERIA.register('random')
class Random(Criterion):
    """A random score in [0, 1) for each unit, drawn once.

    Seed and number of units alone tell the scores, so that resumed runs and all
    processes have the same ones, and nothing needs to be saved.

    Args:
        seed: Seed of the scores, at least 0.
    """

    scores_pruned = True

    def __init__(self, seed: int = 0) -> None:
        check_count('seed', seed, 'a whole number of at least 0', 0)
        self.seed = seed
        self._values: np.ndarray = np.zeros(0)

    def attach(self, context: ScoringContext) -> None:
        """Draw the scores of all units that there were."""
        self._values = np.random.default_rng(self.seed).random(len(context.group_of))

    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the scores."""
        return Scores(self._values.copy())
