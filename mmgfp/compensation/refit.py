"""Least squares with a ridge towards the old weights, from second moments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Ridges that are tried, as shares of the mean squared input.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: A gain below this share of the outputs' energy is rounding.
LEAST_GAIN = 1e-6

NOT_FINITE = 'its inputs, outputs or gradients are not finite'
NO_ROWS = 'it reads nothing in the images at hand'
NO_GAIN = 'no other weights come closer to the outputs on held-out images'


class Moments:
    """Weighted second moments of a layer's inputs and the outputs that it should have.

    A layer is a set of groups that read different inputs, each with a system of its
    own; only group convolutions have more than one.

    Args:
        groups: Groups G.
        inputs: Inputs n of a group.
        outputs: Outputs o of a group.
        device: Where sums are kept, in double precision.

    Attributes:
        xx: Sum over positions of f x x^T, (G, n, n).
        xy: Sum of f x y^T, (G, n, o).
        yy: Sum of f y^2, (G, o).
        importance: How much each output matters when errors are compared, (G, o).

    Examples:
        >>> moments = Moments(1, 2, 1)
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])
        >>> moments.add(x, torch.tensor([[[3.0], [1.0]]]), torch.tensor([[1.0, 0.5]]))
        >>> moments.xx.tolist(), moments.xy.flatten().tolist(), moments.yy.item()
        ([[[1.5, 1.0], [1.0, 2.0]]], [3.5, 1.0], 9.5)
    """

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        device: torch.device | str | None = None,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double, device=device)

        self.xx = zeros(groups, inputs, inputs)
        self.xy = zeros(groups, inputs, outputs)
        self.yy = zeros(groups, outputs)
        self.importance = zeros(groups, outputs)

    def add(
        self, x: Tensor, y: Tensor, f: Tensor, importance: Tensor | None = None
    ) -> None:
        """Add positions.

        Args:
            x: Inputs, (G, P, n).
            y: The outputs that they should give, (G, P, o).
            f: Weights of the positions, (G, P).
            importance: Added to `importance`, (G, o); one for each position if None.
        """
        x, y, f = x.double(), y.double(), f.double()
        weighted = (x * f[:, :, None]).transpose(1, 2)  # (G, n, P)
        self.xx += weighted @ x
        self.xy += weighted @ y
        self.yy += (y.square() * f[:, :, None]).sum(1)
        self.importance += y.shape[1] if importance is None else importance

    def error(self, weight: Tensor) -> Tensor:
        """Return the squared error of weights (G, n, o), by output, (G, o)."""
        products = ((self.xx @ weight - 2 * self.xy) * weight).sum(1)
        return (products + self.yy).clamp(min=0)

    def weigh(self, errors: Tensor) -> float:
        """Return one number for errors by output, (G, o), as they matter."""
        return float((errors * self.importance).sum())

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        return sum(s.nbytes for s in (self.xx, self.xy, self.yy, self.importance))

    @property
    def is_finite(self) -> bool:
        """Whether nothing that was added was infinite or NaN."""
        sums = (self.xx, self.xy, self.yy, self.importance)
        return all(bool(s.isfinite().all()) for s in sums)


@dataclass(frozen=True)
class Refit:
    """New weights of a layer, or the old ones and why they stay.

    Attributes:
        weight: The weights, (G, n, o); None if the old ones stay.
        before: Error of the old weights on held-out images, as a share of the outputs'
            energy.
        after: Error of the new ones, or again of the old ones.
        ridge: The ridge that was chosen, as a share of the mean squared input.
        reason: Why the old weights stay, else None.
    """

    weight: Tensor | None
    before: float
    after: float
    ridge: float | None = None
    reason: str | None = None


def refit(
    moments: Moments,
    held_out: Moments,
    old: Tensor,
    ridges: Sequence[float] = RIDGES,
) -> Refit:
    """Return weights that give the outputs best, W' = argmin sum f |x W' - y|^2 + r.

    The ridge r = lambda |W' - W|^2 holds on to the old weights W where the inputs say
    little. Lambda is the share of trace(sum f x x^T) / n by which held-out images come
    off best; where the old weights do, they stay.

    Refitting the layer that reads lost channels is due to channel pruning by
    reconstruction (He et al., 2017, arXiv 1707.06168, section 3.2) and ThiNet (Luo et
    al., 2017, arXiv 1707.06342, section 3.3); the solution from second moments to
    optimal brain compression (Frantar et al., 2022, arXiv 2208.11580).

    Args:
        moments: Moments to fit to.
        held_out: Moments of other images, to choose by.
        old: Old weights, (G, n, o).
        ridges: Candidates, as shares of the mean squared input of a group.
    """
    if not (moments.is_finite and held_out.is_finite and old.isfinite().all()):
        return Refit(None, float('nan'), float('nan'), reason=NOT_FINITE)
    old = old.double()
    energy = held_out.weigh(held_out.yy)
    if energy == 0 or not moments.yy.any():
        return Refit(None, 0.0, 0.0, reason=NO_ROWS)
    before = best = held_out.weigh(held_out.error(old)) / energy
    chosen: tuple[Tensor, float] | None = None
    missing = moments.xy - moments.xx @ old  # (G, n, o)
    for ridge in ridges:
        new = old + _solve(moments.xx, missing, ridge)
        error = held_out.weigh(held_out.error(new)) / energy
        if error < min(best, before - LEAST_GAIN):  # not so if NaN
            best, chosen = error, (new, ridge)
    if chosen is None:
        return Refit(None, before, before, reason=NO_GAIN)
    return Refit(chosen[0], before, best, chosen[1])


def _solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve (matrix + ridge * its mean diagonal * I) z = right, (G, n, n), (G, n, o).

    A group that has no solution, as one that reads zeros alone, gets zeros.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge * diagonal.mean(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(damped)
    solved = torch.cholesky_solve(right, factor)
    usable = (failed == 0) & solved.flatten(1).isfinite().all(1)
    return torch.where(usable[:, None, None], solved, 0.0)
