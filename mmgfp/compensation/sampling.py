"""Which batches and positions a layer is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmgfp.compensation.inputs import Block, LinearSystem
from mmgfp.compensation.refit import Moments


@dataclass
class Target:
    """One call of a layer of the original model, at all positions or a sample.

    Attributes:
        y: Its outputs, as far as the compact model has them, by position, (G, P, o).
        squares: Mean over these outputs of the squared gradients of the loss, (G, P);
            None if these do not matter.
        importance: Sum over all positions of the squared gradients, (G, o).
        count: Number of all positions.
        x: Its input, as far as the compact model has it; None if not asked for.
        index: The positions P of a sample; None if these are all.
        share: How often each was to be expected in it, (P,).
    """

    y: Tensor
    squares: Tensor | None
    importance: Tensor
    count: int
    x: Tensor | None = None
    index: Tensor | None = None
    share: Tensor | None = None

    @property
    def ways(self) -> list[Tensor]:
        """Weights of the positions: squared gradients, if any, and all alike."""
        alike = torch.ones_like(self.y[:, :, 0])  # (G, P)
        return [alike] if self.squares is None else [self.squares, alike]

    def sampled(self, rows: int, seed: int) -> Target:
        """Return the same at a sample of ``rows`` positions by weight, if it has more.

        Args:
            rows: Positions that are taken at most.
            seed: Number from which random numbers start.
        """
        if self.count <= rows:
            return self
        index, share = sample(sum(self.ways).mean(0), rows, seed)  # type: ignore[union-attr]
        squares = None if self.squares is None else self.squares[:, index]
        kept = (self.importance, self.count, self.x, index, share)
        return Target(self.y[:, index], squares, *kept)


def add_call(
    moments: Sequence[Moments],
    system: LinearSystem,
    x: Tensor,
    target: Target,
    block: Block,
) -> None:
    """Add a call of a layer to its moments.

    Args:
        moments: Moments to add to, one for each way to weigh positions: by squared
            gradients, if there are any, and all alike.
        system: The layer.
        x: Its input.
        target: What it should give.
        block: The inputs that are fitted.
    """
    index, ways = target.index, target.ways
    if index is None:
        index = torch.arange(target.count, device=x.device)
    if target.share is not None:
        ways = [f / target.share for f in ways]
    start = 0
    importance = target.importance
    for inputs in system.rows(x, index):  # (G, P, n)
        part = slice(start, start + inputs.shape[1])
        start = part.stop
        whole = target.y[:, part]
        inputs, y = block.split(inputs, whole)
        outputs = None if y is whole else whole  # else they would be squared twice
        for sums, f in zip(moments, ways, strict=True):
            sums.add(inputs, y, f[:, part], importance, outputs)
        importance = torch.zeros_like(importance)  # of the whole call


def sample(weights: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw positions in proportion to their weights, one from each equal share.

    Args:
        weights: Weights of all positions, (P,).
        size: How many to draw; some may come twice.
        seed: Number from which random numbers start.

    Returns:
        Positions, and how often each was to be expected, (size,) each: sums of values
        divided by these are sums over all positions, but for chance.
    """
    ends = weights.double().cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(size, generator=generator, dtype=torch.double).to(ends)
    points = (torch.arange(size, device=ends.device) + within) / size * ends[-1]
    index = torch.searchsorted(ends, points, right=True).clamp(max=len(ends) - 1)
    return index, weights.double()[index] * (size / ends[-1])


def held_out(batches: int, share: float) -> list[bool]:
    """Return which batches are held out, evenly spread, one or more but not all.

    Examples:
        >>> held_out(8, 0.25)
        [False, False, False, True, False, False, False, True]
        >>> held_out(3, 0.25)
        [False, False, True]
    """
    chosen = np.diff(np.floor(np.arange(batches + 1) * share + 1e-9)) > 0
    if not chosen.any():
        chosen[-1] = True
    if chosen.all():
        chosen[0] = False
    return chosen.tolist()
