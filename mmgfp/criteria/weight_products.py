"""Products of weights and their gradients, taken off the parameters inside of backward.

Optimizers change gradients, and training loops drop them, before an iteration is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.criteria.backward_passes import is_reached
from mmgfp.criteria.base import ScoringContext
from mmgfp.criteria.unit_weights import UnitWeights


class WeightProducts:
    """Adds up ``(w · ∂L/∂w)²`` over the weights that make each unit.

    The gradient is that of all backward passes of an iteration together; until the
    iteration ends, a tensor of each such weight's size is held.
    """

    def __init__(self) -> None:
        self._context: ScoringContext | None = None
        self._weights: UnitWeights | None = None
        self._makers: dict[str, nn.Parameter] = {}
        self._products: dict[str, Tensor] = {}
        self._handles: dict[str, Any] = {}
        self._active = True

    def attach(self, context: ScoringContext, device: torch.device) -> None:
        """Watch the gradients of all weights that make units."""
        if context is not self._context:
            self._context, self._weights = context, UnitWeights(context)
            self._makers = self._weights.parameters()
            self._products.clear()
        self._hook()

    def _hook(self) -> None:
        for name, parameter in self._makers.items():
            if parameter.requires_grad and name not in self._handles:
                hook = self._hook_of(name, parameter)
                self._handles[name] = parameter.register_hook(hook)

    def _hook_of(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            if self._active and is_reached(parameter):
                weight = parameter.detach()
                dtype = torch.promote_types(weight.dtype, torch.float32)
                product = weight.to(dtype) * grad.detach().to(dtype)
                other = self._products.get(name)
                self._products[name] = product if other is None else other + product

        return hook

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def watch(self, active: bool) -> None:
        """Let the next iteration count, or not."""
        self._active = active
        self._hook()  # a layer may be trained from some iteration on

    @torch.no_grad()
    def take(self, loss_scale: float) -> tuple[Tensor, np.ndarray] | None:
        """Return the sums of squares (1, U), and groups with frozen makers.

        Args:
            loss_scale: What the loss was multiplied with before backward.
        """
        products, self._products = self._products, {}
        if not products:
            return None
        assert self._weights is not None

        def square_sum(vectors: Tensor) -> Tensor:
            return (vectors.double() / loss_scale).square().sum(1)

        weights = self._weights
        totals = weights.totals(products, square_sum)
        sums = weights.of_units(totals)
        # Units that were cut out have no sum, nor have groups without a gradient.
        known = weights.of_units(
            [None if t is None else torch.ones_like(t) for t in totals]
        )
        frozen = [n for n, p in self._makers.items() if not p.requires_grad]
        unseen = {g for name in frozen for g in weights.groups_of[name]}
        rows = sums.where(known.isfinite(), 0)[None]
        return rows, np.array(sorted(unseen), dtype=int)

    def take_warnings(self) -> list[str]:
        """Return nothing: what has no gradient has no part in the loss."""
        return []
