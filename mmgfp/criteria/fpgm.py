"""Distance of a unit to the others of its group (He et al. 2019, arXiv 1811.00250)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgfp.criteria.base import CRITERIA
from mmgfp.criteria.unit_weights import WeightCriterion


@CRITERIA.register('fpgm')
class FPGM(WeightCriterion):
    """Mean distance of a unit's weights to those of the other units of its group.

    A unit close to the geometric median of all can be replaced by the others. The
    paper sums where this takes the mean, which orders the units of a group alike and
    lets groups of unlike numbers be compared. What makes a unit is one vector, so
    squared distances are added over the layers.
    """

    def measure(self, vectors: Tensor) -> Tensor:
        """Return the squared distances of all pairs, (units, units)."""
        # In double precision, as squares of near vectors cancel.
        vectors = vectors.double()
        return torch.cdist(vectors, vectors).square()

    def finish(self, total: Tensor) -> Tensor:
        """Return the mean distances to the others, (units,)."""
        return total.sqrt().sum(1) / max(len(total) - 1, 1)
