"""Layer-adaptive magnitude (Lee et al. 2021, arXiv 2010.07611), extended to units."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgfp.criteria.base import CRITERIA
from mmgfp.criteria.unit_weights import WeightCriterion


@CRITERIA.register('lamp')
class LAMP(WeightCriterion):
    """Squared norm of a unit as a share of those that are not smaller in its group.

    The paper's score of a weight, ``w_u² / Σ_{v: |w_v| ≥ |w_u|} w_v²``,
    with a unit in the place of a weight and a group in that of a layer: ``w²`` is then
    the sum of the squares of all weights that make the unit. The largest unit of each
    group has 1, whatever its layers are scaled by. Scores do not depend on smaller
    units, so taking the smallest ones of several groups in turn is what the paper does.
    """

    def measure(self, vectors: Tensor) -> Tensor:
        """Return the sums of squares, (units,)."""
        return vectors.double().square().sum(1)

    def finish(self, total: Tensor) -> Tensor:
        """Return the scores, (units,)."""
        ordered, order = total.sort(stable=True)
        not_smaller = ordered.flip(0).cumsum(0).flip(0)
        shares = ordered / not_smaller.clamp(min=1e-300)  # all may be zero
        return torch.empty_like(shares).index_copy_(0, order, shares)
