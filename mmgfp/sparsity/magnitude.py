"""The smallest weights go (Han et al. 2015), little by little (Zhu and Gupta 2017)."""

from __future__ import annotations

from torch import Tensor

from mmgfp.sparsity.sparsifier import FixedZeros, largest_of


class Magnitude(FixedZeros):
    """Keeps the weights of the largest absolute value.

    Weights that are zero get no gradient, so they do not come back (Han et al. 2015,
    arXiv 1506.02626, section 3).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from mmgfp.sparsity.config import SparsityConfig
        >>> net = nn.Linear(4, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
        >>> Magnitude(net, SparsityConfig(sparsity=0.5)).decide(0.5)
        >>> net.weight.tolist()
        [[3.0, 0.0, 0.0, -4.0]]
    """

    def choose(self, density: float) -> dict[str, Tensor]:
        """Return masks of the largest weights."""
        sizes = {name: weight.detach().abs() for name, weight in self.weights.items()}
        assert self.config.scope is not None
        return largest_of(sizes, density, self.config.scope)
