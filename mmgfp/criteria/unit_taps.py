"""What taps on the layers of a model show of its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.criteria.base import ScoringContext
from mmgfp.criteria.mask_gradients import unit_gradients
from mmgfp.criteria.masked_inputs import MaskedInputs, is_linear_in_inputs
from mmgfp.criteria.tap import MaskGradientTap, Summary
from mmgfp.utils.modules import weight_owners


class UnitTaps:
    """Taps all layers that read units, and adds up what they show of each unit.

    Of residual blocks, what their last norm or layer puts out is tapped.

    Args:
        summary: Taken off the layers' inputs in place of the mask gradients.

    Attributes:
        tap: The tap on the layers; None before `attach`.
        units: The unit of each input channel by tapped layer, (C,), -1 for none; of a
            block, by its name, its own number, (1,).
    """

    def __init__(self, summary: Summary | None = None) -> None:
        self.tap: MaskGradientTap | None = None
        self.units: dict[str, Tensor] = {}
        self._summary = summary
        self._context: ScoringContext | None = None
        self._groups_read: dict[str, np.ndarray] = {}
        self._count = 0
        #: Pruned units among these have no gradient here, (U,).
        self._blind = np.zeros(0, dtype=bool)
        self._warnings: list[str] = []

    def attach(self, context: ScoringContext, device: torch.device) -> None:
        """Tap all layers that read units."""
        if context is not self._context:
            self._prepare(context, device)
        assert self.tap is not None
        self.tap.attach()

    def _prepare(self, context: ScoringContext, device: torch.device) -> None:
        self._context, self._count = context, len(context.group_of)
        numbers = np.append(context.numbers, -1)  # the last one is for no unit
        blocks = context.grouping.blocks
        own = context.numbers[len(context.numbers) - len(blocks) :]
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
        self.units = {layer: index.to(device) for layer, index in units.items()}
        modules = dict(context.model.named_modules())
        masked = self._masked_inputs(context, owners, modules)
        self.tap = MaskGradientTap(
            {layer: modules[layer] for layer in units},
            context.rows,
            units,
            context.model,
            self._summary,
            masked,
            {block.name: block.last for block in blocks},
        )
        for block, number in zip(blocks, own, strict=True):
            self.units[block.name] = torch.tensor([number], device=device)
            self._groups_read[block.name] = context.group_of[[number]]

    def _masked_inputs(
        self,
        context: ScoringContext,
        owners: Mapping[str, Sequence[str]],
        modules: Mapping[str, nn.Module],
    ) -> MaskedInputs | None:
        """Return what gives pruned units gradients, if any may come back."""
        self._blind = np.zeros(self._count, dtype=bool)
        if context.aside is None or self._summary is not None:
            return None
        weights = {layer: w for w, layers in owners.items() for layer in layers}
        known = {}
        for layer, index in self.units.items():
            if is_linear_in_inputs(modules[layer], layer, context.rows):
                known[layer] = weights[layer]
            else:
                self._blind[index[index >= 0].cpu().numpy()] = True
        return MaskedInputs(context.aside, known)

    def known(self, values: np.ndarray) -> np.ndarray:
        """Return values of units, (U,), with NaN for those that show nothing.

        These are pruned units that are read by layers of other kinds than
        `MaskedInputs` knows.
        """
        if self._context is None or self._context.aside is None:
            return values
        return np.where(self._blind & ~self._context.kept, np.nan, values)

    def detach(self) -> None:
        """Take the hooks off the layers."""
        if self.tap is not None:
            self.tap.detach()

    def watch(self, active: bool) -> None:
        """Let calls of the next iteration be tapped, or not."""
        assert self.tap is not None
        self.tap.active = active

    def take(self, loss_scale: float) -> tuple[Tensor, np.ndarray] | None:
        """Return mask gradients by image (N, U), or summaries, and groups in part.

        Args:
            loss_scale: What the loss was multiplied with before backward.
        """
        assert self.tap is not None
        gradients, lost = self.tap.take(), self.tap.take_lost()
        for reason in dict.fromkeys(lost.values()):
            layers = ', '.join(n for n, r in lost.items() if r == reason)
            self._warnings.append(
                f'the inputs of {layers} are not counted in some iterations: {reason}'
            )
        if not gradients:
            return None
        rows = unit_gradients(gradients, self.units, self._count).double()  # (N, U)
        if self._summary is None:
            rows /= loss_scale
        unseen = [self._groups_read[layer] for layer in lost]
        return rows, np.concatenate([np.zeros(0, dtype=int), *unseen])

    def take_warnings(self) -> list[str]:
        """Return which layers' inputs did not count since the last call, and why."""
        warnings, self._warnings = self._warnings, []
        return warnings
