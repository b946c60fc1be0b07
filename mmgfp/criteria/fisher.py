"""Fisher information of channel masks, gathered while the model trains.

The importance of a unit is the sum over images of the squared gradient of its mask;
the mask's gradient is that of all its copies together (paper, section 3.2):
``s_i ∝ Σ_n (Σ_x ∂L_n/∂m_x)²`` with ``∂L_n/∂m_x = Σ_hw A_x · ∂L/∂A_x``.
Where a layer's rows are RoIs, those of one image are summed before the square.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.criteria.base import CRITERIA, Criterion, Reduce, Scores, ScoringContext
from mmgfp.criteria.mask_gradients import unit_gradients, untappable
from mmgfp.criteria.statistics import UnitStatistics
from mmgfp.criteria.tap import MaskGradientTap
from mmgfp.tracing import RowUse
from mmgfp.utils.modules import weight_owners

logger = logging.getLogger('mmgfp')


@CRITERIA.register('fisher')
class Fisher(Criterion):
    """Fisher information of the units' masks (paper, section 3.2, equation 6).

    Attributes:
        tap: Takes the mask gradients off the layers; None before `attach`.
        statistics: What they add up to since the last decision.
        warned: Warnings that were given, each one once.
    """

    # The square of a sum is at most its number of terms times the sum of the squares,
    # so scores bound what several units cost together.
    additive = True

    def __init__(self) -> None:
        self.tap: MaskGradientTap | None = None
        self.statistics = UnitStatistics(np.zeros(0, dtype=int))
        self._context: ScoringContext | None = None
        self._units: dict[str, torch.Tensor] = {}
        self._groups_read: dict[str, np.ndarray] = {}
        self.warned: set[str] = set()

    def unscorable(
        self, model: nn.Module, weights: Sequence[str], rows: RowUse
    ) -> dict[str, str]:
        """Return layers whose input cannot be tapped, or told to images."""
        return untappable(weights, weight_owners(model), rows)

    def attach(self, context: ScoringContext) -> None:
        """Tap all layers that read units; sums of earlier iterations stay."""
        if context is not self._context:
            self._prepare(context)
        assert self.tap is not None
        self.tap.attach()

    def _prepare(self, context: ScoringContext) -> None:
        if self.statistics.group_of is not context.group_of:  # other units
            device = next(context.model.parameters()).device
            self.statistics = UnitStatistics(context.group_of, device)
        self._context = context
        numbers = np.append(context.numbers, -1)  # the last one is for no unit
        owners = weight_owners(context.model)
        units = {
            layer: torch.from_numpy(numbers[index])
            for weight, index in context.grouping.inputs.items()
            for layer in owners.get(weight, ())
            if layer in context.rows.called and (index >= 0).any()
        }
        self._groups_read = {
            layer: np.unique(context.group_of[index[index >= 0].numpy()])
            for layer, index in units.items()
        }
        device = self.statistics.device
        self._units = {layer: index.to(device) for layer, index in units.items()}
        modules = dict(context.model.named_modules())
        self.tap = MaskGradientTap(
            {layer: modules[layer] for layer in units},
            context.rows,
            units,
            context.model,
        )

    @property
    def layers(self) -> list[str]:
        """Names of the tapped layers."""
        return list(self._units)

    def detach(self) -> None:
        """Take the hooks off the layers."""
        if self.tap is not None:
            self.tap.detach()

    def watch(self, active: bool) -> None:
        """Let calls of the next iteration be tapped, or not."""
        assert self.tap is not None
        self.tap.active = active

    def update(self, loss_scale: float = 1.0) -> None:
        """Add the squared mask gradients of one iteration."""
        assert self.tap is not None
        gradients, lost = self.tap.take(), self.tap.take_lost()
        for reason in dict.fromkeys(lost.values()):
            layers = ', '.join(n for n, r in lost.items() if r == reason)
            message = (
                f'the inputs of {layers} are not counted in some iterations: {reason}'
            )
            if message not in self.warned:
                self.warned.add(message)
                logger.warning(message)
        if gradients:
            count = len(self.statistics.group_of)
            per_image = unit_gradients(gradients, self._units, count)  # (N, U)
            squares = (per_image.double() / loss_scale).square().sum(0)  # (U,)
            unseen = [self._groups_read[layer] for layer in lost]
            self.statistics.add(
                squares, np.concatenate([np.zeros(0, dtype=int), *unseen])
            )

    def scores(self, reduce: Reduce | None = None) -> Scores:
        """Return the sums of squares of all processes.

        Losses are means over the images of a process; so the squares of W processes
        are divided by W², which is what one process sees that has all the images.
        """
        sums, processes = self.statistics.collect(reduce)
        return Scores(sums.values / processes**2, sums.nonfinite, sums.nonfinite_in_row)

    def reset(self) -> None:
        """Start the sums anew; iterations that did not count still do."""
        self.statistics.reset()

    def gather(self, reduce: Reduce | None, keep: bool) -> None:
        """Let one process hold the sums of all."""
        self.statistics.gather(reduce, keep)

    def clear(self) -> None:
        """Forget the sums."""
        self.statistics.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums by name."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with sums that were saved.

        Raises:
            ConfigError: If they are of other units.
        """
        self.statistics.load_state_dict(state)
