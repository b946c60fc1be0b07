"""Sum of the absolute weights that make a unit (Li et al. 2017, arXiv 1608.08710)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgfp.criteria.base import CRITERIA
from mmgfp.criteria.unit_weights import WeightCriterion


@CRITERIA.register('l1')
class L1(WeightCriterion):
    """Sum of the absolute weights that make a unit, ``Σ |w|``.

    Biases and norms that go along with the unit do not count.
    """

    def measure(self, vectors: Tensor) -> Tensor:
        """Return the sums of absolute values, (units,)."""
        return vectors.abs().sum(1, dtype=torch.float64)
