"""Activations of a unit: their mean magnitude, or how often they are not zero."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.criteria.base import CRITERIA, Reduce, Scores
from mmgfp.criteria.mask_gradients import untappable
from mmgfp.criteria.unit_taps import UnitTaps
from mmgfp.criteria.watching import WatchingCriterion
from mmgfp.tracing import RowUse
from mmgfp.utils.modules import weight_owners
from mmgfp.utils.validation import check

logger = logging.getLogger('mmgfp')


@CRITERIA.register('activation')
class Activation(WatchingCriterion):
    """Mean of a unit's activations over images, positions and the layers that read it.

    Activations are what layers read, behind norms and non-linearities. All places at
    which some layer reads the unit count alike, in the iterations since the last
    decision; a tensor that several layers read counts once.

    Args:
        of: ``'magnitude'`` for the mean of ``|A|``, or ``'apoz'`` for the share that is
            not zero: 1 - APoZ, the average percentage of zeros (Hu et al. 2016, arXiv
            1607.03250), which says something behind a ReLU alone.
    """

    watcher: UnitTaps
    scores_pruned = True

    def __init__(self, of: str = 'magnitude') -> None:
        is_known = isinstance(of, str) and of in SUMMARIES
        check('of', is_known, f'one of {", ".join(SUMMARIES)}', of)
        super().__init__(UnitTaps(SUMMARIES[of]))
        self.of = of

    def unscorable(
        self, model: nn.Module, weights: Sequence[str], rows: RowUse
    ) -> dict[str, str]:
        """Return layers whose input cannot be tapped."""
        return untappable(weights, weight_owners(model), rows, 'its activations')

    def statistics_groups(self, group_of: np.ndarray) -> np.ndarray:
        """Return the groups of all sums, then of all counts, (2 U,)."""
        return np.tile(group_of, 2)

    def values(self, rows: Tensor) -> Tensor:
        """Return the sums over activations, then their numbers, (2 U,).

        Args:
            rows: Both in turn for each forward pass, (2 P, U).
        """
        return rows.view(-1, 2, rows.shape[1]).sum(0).flatten()

    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the means over the activations of all processes."""
        both, _ = self.statistics.collect(reduce)
        sums, counts = np.split(both.values, 2)
        means = np.divide(
            sums, counts, out=np.full(len(sums), np.nan), where=counts > 0
        )
        self._warn_of_no_zeros(means)
        return Scores(means, both.nonfinite, both.nonfinite_in_row)

    def _warn_of_no_zeros(self, means: np.ndarray) -> None:
        message = (
            "no activation is ever zero, so that of='apoz' tells no units apart; use "
            "of='magnitude' where there is no ReLU"
        )
        known = means[~np.isnan(means)]
        is_useful = self.of != 'apoz' or not len(known) or (known < 1).any()
        if not is_useful and message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


def _magnitude(x: Tensor, channel_dim: int) -> Tensor:
    """Return the sums of the absolute values of each channel, and their number, (2, C).

    Args:
        x: Input of a layer, (N, C, H, W) with ``channel_dim`` 1 or (N, ..., C) with -1.
        channel_dim: The dimension that holds the channels.
    """
    others = _others(x, channel_dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _with_count(torch.linalg.vector_norm(x, 1, others, dtype=dtype), x)


def _nonzero(x: Tensor, channel_dim: int) -> Tensor:
    """Return how many values of each channel are not zero, and their number, (2, C)."""
    count = x.count_nonzero(_others(x, channel_dim)).float()
    # A value that is not finite is not zero either, but says nothing.
    return _with_count(count.where(x.isfinite().all(), torch.nan), x)


def _others(x: Tensor, channel_dim: int) -> list[int]:
    return [d for d in range(x.dim()) if d != channel_dim % x.dim()]


def _with_count(sums: Tensor, x: Tensor) -> Tensor:
    count = x.numel() // max(len(sums), 1)
    return torch.stack([sums, torch.full_like(sums, count)])


SUMMARIES = {'magnitude': _magnitude, 'apoz': _nonzero}
