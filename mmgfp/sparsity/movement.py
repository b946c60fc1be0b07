"""Weights that training moves towards zero go (Sanh et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.sparsifier import KeptAside, largest_of
from mmgfp.utils.errors import StatisticsError


class Movement(KeptAside):
    """Keeps the weights that moved away from zero most.

    Scores add up ``-w · ∂L/∂w`` over the steps (arXiv 2005.07683, section 4),
    for weights that are zero as well: with their value as it was when they went, and
    the gradient of the loss by the zero in its place. Thus they may come back with that
    value, which stands still meanwhile.

    Attributes:
        scores: Sums so far, by weight.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig) -> None:
        super().__init__(model, config)
        self.scores = {n: torch.zeros_like(w.detach()) for n, w in self.weights.items()}

    def choose(self, density: float) -> dict[str, Tensor]:
        """Return masks of the largest scores.

        Raises:
            StatisticsError: If there are none yet.
        """
        if not any(score.any() for score in self.scores.values()):
            raise StatisticsError(
                'begin',
                'after a step of the optimizer',
                'scores of 0 alone',
                'begin later, or lower the scale of the loss that a scaler begins with',
            )
        assert self.config.scope is not None
        return largest_of(self.scores, density, self.config.scope)

    @torch.no_grad()
    def before_step(self, scale: float) -> None:
        """Add to the scores; take the gradients of masked weights away."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                moved = self.dense(name) * weight.grad
                self.scores[name].sub_(moved, alpha=1 / scale)
                weight.grad.masked_fill_(~self.masks[name], 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights, in plain types."""
        scores = {name: score.cpu() for name, score in self.scores.items()}
        return super().state_dict() | {'scores': scores}

    def _read(self, state: Mapping[str, Any]) -> None:
        super()._read(state)
        for name, score in self.scores.items():
            score.copy_(state['scores'][name])
