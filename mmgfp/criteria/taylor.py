"""First-order change of the loss (Molchanov et al. 2019, arXiv 1906.10771)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmgfp.criteria.base import CRITERIA, Reduce, Scores
from mmgfp.criteria.mask_gradients import untappable
from mmgfp.criteria.unit_taps import UnitTaps
from mmgfp.criteria.watching import WatchingCriterion
from mmgfp.criteria.weight_products import WeightProducts
from mmgfp.tracing import RowUse
from mmgfp.utils.modules import weight_owners
from mmgfp.utils.validation import check


@CRITERIA.register('taylor')
class Taylor(WatchingCriterion):
    """Squared change of the loss, to first order, if a unit is removed.

    Args:
        of: ``'gates'`` for the squared gradient of the unit's mask, ``(Σ A · ∂L/∂A)²``,
            where `fisher` squares image by image and this batch by batch; ``'weights'``
            for the sum of ``(w · ∂L/∂w)²`` over all weights that make the unit. The
            paper's other choice for weights, to square their sum, is 0 for every layer
            before a batch norm, which undoes any factor on them.

    Attributes:
        additive: Only for gates, whose gradients add up like those of copies.
        scores_pruned: Only for gates, as the weights of pruned units get no gradient.
        scores_blocks: Only for gates, as a block has one.
    """

    needs_gradients = True

    def __init__(self, of: str = 'gates') -> None:
        check('of', of in ('gates', 'weights'), 'gates or weights', of)
        self.of = of
        is_of_gates = of == 'gates'
        self.additive = self.scores_pruned = self.scores_blocks = is_of_gates
        super().__init__(UnitTaps() if of == 'gates' else WeightProducts())

    def unscorable(
        self, model: nn.Module, weights: Sequence[str], rows: RowUse
    ) -> dict[str, str]:
        """Return layers whose input cannot be tapped, if gates are asked for."""
        if self.of == 'weights':
            return {}
        return untappable(weights, weight_owners(model), rows, 'its gates')

    def values(self, rows: Tensor) -> Tensor:
        """Return the values of one iteration.

        Args:
            rows: Mask gradients by image, (N, U); or sums of squares, (1, U).
        """
        batch = rows.sum(0)
        return batch.square() if self.of == 'gates' else batch

    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the sums over batches, those of several processes as their mean.

        Each process squares the gradient of its own part of a batch.
        """
        sums, processes = self.statistics.collect(reduce)
        values = sums.values / processes
        if isinstance(self.watcher, UnitTaps):
            values = self.watcher.known(values)
        return Scores(values, sums.nonfinite, sums.nonfinite_in_row)
