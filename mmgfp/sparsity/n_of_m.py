"""At most n of every m weights along the inputs of a layer are not zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.masks import keep_n_of_m
from mmgfp.sparsity.sparsifier import FixedZeros, KeptAside


class FixedNOfM(FixedZeros):
    """Keeps the n largest of every m weights, chosen once, as NVIDIA's recipe does.

    The recipe (Mishra et al. 2021, arXiv 2104.08378) is to train, to choose
    by magnitude, and to train again as long.
    """

    def choose(self, density: float) -> dict[str, Tensor]:
        """Return masks of the n largest weights of every m."""
        return _masks(self.weights, self.config)


class SRSTE(KeptAside):
    """Keeps the n largest of every m weights, chosen anew at each step.

    The "sparse-refined straight-through estimator" (Zhou et al. 2021, arXiv
    2102.04010): a step moves the dense weight W by the gradient of the loss by
    the sparse one, plus ``decay · (1 - mask) · W``.
    """

    def choose(self, density: float) -> dict[str, Tensor]:
        """Return masks of the n largest weights of every m."""
        dense = {name: self.dense(name) for name in self.weights}
        return _masks(dense, self.config)

    @torch.no_grad()
    def before_step(self, scale: float) -> None:
        """Put the dense weights in, and add the term of decay to their gradients."""
        assert self.config.decay is not None
        if not self.begun:
            return
        for name, weight in self.weights.items():
            weight.copy_(self.dense(name))
            if weight.grad is not None:
                masked = weight.masked_fill(self.masks[name], 0)
                weight.grad.add_(masked, alpha=self.config.decay * scale)

    @torch.no_grad()
    def after_step(self) -> None:
        """Choose anew, keep the dense weights aside, and set the others to zero."""
        for name, weight in self.weights.items():
            self.aside[name].copy_(weight)
        self.masks.update(_masks(self.weights, self.config))
        super().after_step()
        self.mask_copies()


def _masks(weights: Mapping[str, Tensor], config: SparsityConfig) -> dict[str, Tensor]:
    assert config.n is not None and config.m is not None
    return {name: keep_n_of_m(w, config.n, config.m) for name, w in weights.items()}
