"""Euclidean norm of the weights that make a unit (Li et al. 2017, arXiv 1608.08710)."""

from __future__ import annotations

from torch import Tensor

from mmgfp.criteria.base import CRITERIA
from mmgfp.criteria.unit_weights import WeightCriterion


@CRITERIA.register('l2')
class L2(WeightCriterion):
    """Norm of all weights that make a unit as one vector, ``√Σ w²``.

    Biases and norms that go along with the unit do not count.
    """

    def measure(self, vectors: Tensor) -> Tensor:
        """Return the sums of squares, (units,)."""
        return vectors.double().square().sum(1)

    def finish(self, total: Tensor) -> Tensor:
        """Return the norms, (units,)."""
        return total.sqrt()
