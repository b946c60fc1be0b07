"""Fisher information of channel masks, gathered while the model trains.

The importance of a unit is the sum over images of the squared gradient of its mask;
the mask's gradient is that of all its copies together (paper, section 3.2):
``s_i ∝ Σ_n (Σ_x ∂L_n/∂m_x)²`` with ``∂L_n/∂m_x = Σ_hw A_x · ∂L/∂A_x``.
Where a layer's rows are RoIs, those of one image are summed before the square.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmgfp.criteria.base import CRITERIA, Reduce, Scores
from mmgfp.criteria.mask_gradients import untappable
from mmgfp.criteria.tap import MaskGradientTap
from mmgfp.criteria.unit_taps import UnitTaps
from mmgfp.criteria.watching import WatchingCriterion
from mmgfp.tracing import RowUse
from mmgfp.utils.modules import weight_owners


@CRITERIA.register('fisher')
class Fisher(WatchingCriterion):
    """Fisher information of the units' masks (paper, section 3.2, equation 6)."""

    # The square of a sum is at most its number of terms times the sum of the squares,
    # so scores bound what several units cost together.
    additive = True
    scores_pruned = True
    needs_gradients = True
    scores_blocks = True
    watcher: UnitTaps

    def __init__(self) -> None:
        super().__init__(UnitTaps())

    @property
    def tap(self) -> MaskGradientTap:
        """Takes the mask gradients off the layers."""
        assert self.watcher.tap is not None, 'attach comes first'
        return self.watcher.tap

    @property
    def layers(self) -> list[str]:
        """Names of the tapped layers."""
        return list(self.watcher.units)

    def unscorable(
        self, model: nn.Module, weights: Sequence[str], rows: RowUse
    ) -> dict[str, str]:
        """Return layers whose input cannot be tapped, or told to images."""
        return untappable(weights, weight_owners(model), rows)

    def values(self, rows: Tensor) -> Tensor:
        """Return the squared mask gradients of one iteration, summed over images.

        Args:
            rows: Mask gradients by image, (N, U).
        """
        return rows.square().sum(0)

    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the sums of squares of all processes.

        Losses are means over the images of a process; so the squares of W processes
        are divided by W², which is what one process sees that has all the images.
        """
        sums, processes = self.statistics.collect(reduce)
        values = self.watcher.known(sums.values / processes**2)
        return Scores(values, sums.nonfinite, sums.nonfinite_in_row)
