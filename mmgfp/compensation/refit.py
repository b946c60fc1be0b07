"""Least squares with a ridge towards the old weights, from second moments alone.

Refitting the layer that reads lost channels is due to channel pruning by reconstruction
(He et al., 2017, arXiv 1707.06168, section 3.1) and ThiNet (Luo et al., 2017, arXiv
1707.06342, section 3.3); the solution from second moments to optimal brain compression
(Frantar et al., 2022, arXiv 2208.11580).
"""

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
NO_ROWS = 'nothing of it reaches the loss in the images at hand'
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
        energy: Sum of f y^2 of the layer's whole outputs, where y is what other inputs
            leave of them, (G, o).
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
        self.energy = zeros(groups, outputs)
        self.importance = zeros(groups, outputs)

    def add(
        self,
        x: Tensor,
        y: Tensor,
        f: Tensor,
        importance: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> None:
        """Add positions.

        Args:
            x: Inputs, (G, P, n).
            y: The outputs that they should give, (G, P, o).
            f: Weights of the positions, (G, P).
            importance: Added to `importance`, (G, o); one for each position if None.
            whole: The layer's whole outputs, (G, P, o); y if None.
        """
        x, y, f = x.double(), y.double(), f.double()
        weighted = (x * f[:, :, None]).transpose(1, 2)  # (G, n, P)
        self.xx += weighted @ x
        self.xy += weighted @ y
        squares = (y.square() * f[:, :, None]).sum(1)
        self.yy += squares
        if whole is not None:
            squares = (whole.double().square() * f[:, :, None]).sum(1)
        self.energy += squares
        self.importance += y.shape[1] if importance is None else importance

    def error(self, weight: Tensor) -> Tensor:
        """Return the squared error of weights (G, n, o), by output, (G, o)."""
        products = ((self.xx @ weight - 2 * self.xy) * weight).sum(1)
        return (products + self.yy).clamp(min=0)

    def weigh(self, errors: Tensor) -> float:
        """Return one number for errors by output, (G, o), as they matter."""
        return float((errors * self.importance).sum())

    @classmethod
    def mixed(cls, parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
        """Return the sum of moments, each times its share."""
        groups, inputs, outputs = parts[0].xy.shape
        total = cls(groups, inputs, outputs, parts[0].xx.device)
        for part, share in zip(parts, shares, strict=True):
            for name, value in vars(total).items():
                value += share * getattr(part, name)
        return total

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        return sum(s.nbytes for s in vars(self).values())

    @property
    def is_finite(self) -> bool:
        """Whether nothing that was added was infinite or NaN."""
        return all(bool(s.isfinite().all()) for s in vars(self).values())


@dataclass(frozen=True)
class Refit:
    """New weights of a layer, or the old ones and why they stay.

    Attributes:
        weight: The weights, (G, n, o); None if the old ones stay.
        before: Error of the old weights on held-out images, as a share of the outputs'
            energy.
        after: Error of the new ones, or again of the old ones.
        ridge: The ridge that was chosen, as a share of the mean squared input.
        shares: The shares of weightings that were chosen.
        reason: Why the old weights stay, else None.
    """

    weight: Tensor | None
    before: float
    after: float
    ridge: float | None = None
    shares: tuple[float, ...] | None = None
    reason: str | None = None


def refit(
    fit: Sequence[Moments],
    held_out: Sequence[Moments],
    old: Tensor,
    ridges: Sequence[float] = RIDGES,
    shares: Sequence[tuple[float, ...]] = ((1.0,),),
    free_bias: bool = False,
) -> Refit:
    """Return weights that give the outputs best, W' = argmin sum f |x W' - y|^2 + r.

    The ridge r = lambda |W' - W|^2 holds on to the old weights W where the inputs say
    little. Lambda, a share of trace(sum f x x^T) / n, and f, where there are several
    candidates, are those by which held-out images come off best; where the old weights
    do, they stay.

    Args:
        fit: Moments to fit to, one for each way to weigh positions.
        held_out: Moments of other images, to choose by, in the same order.
        old: Old weights, (G, n, o).
        ridges: Candidates, as shares of the mean squared input of a group.
        shares: Candidates for f, by the share that each way to weigh has in it.
            Held-out errors are weighed by the first one.
        free_bias: Whether the last input is 1 and its weights, for a start those that
            suit the others best, are not held on to.
    """
    if not all(m.is_finite for m in (*fit, *held_out)) or not old.isfinite().all():
        return Refit(None, float('nan'), float('nan'), reason=NOT_FINITE)
    judge = Moments.mixed(held_out, shares[0])
    energy = judge.weigh(judge.energy)
    if energy == 0 or not any(m.yy.any() for m in fit):
        return Refit(None, 0.0, 0.0, reason=NO_ROWS)
    old = old.double()
    start = _with_best_bias(Moments.mixed(fit, shares[0]), old) if free_bias else old
    before = best = judge.weigh(judge.error(start)) / energy
    chosen = None
    for mix in shares:
        moments = Moments.mixed(fit, mix)
        for ridge in ridges:
            new = _solve(moments, old, ridge, free_bias)
            error = judge.weigh(judge.error(new)) / energy
            if error < min(best, before - LEAST_GAIN):  # not so if NaN
                best, chosen = error, (ridge, mix)
    if chosen is None:
        return Refit(None, before, before, reason=NO_GAIN)
    # Once these are chosen, the images that they were chosen by are of use as well.
    ridge, mix = chosen
    everything = Moments.mixed([*fit, *held_out], [*mix, *mix])
    new = _solve(everything, old, ridge, free_bias)
    return Refit(new, before, best, ridge, mix)


def _with_best_bias(moments: Moments, weight: Tensor) -> Tensor:
    """Return weights (G, n, o) with the last row that suits the others best."""
    total = moments.xx[:, -1:, -1:].clamp(min=torch.finfo(torch.double).tiny)
    rest = moments.xy[:, -1:] - moments.xx[:, -1:, :-1] @ weight[:, :-1]
    return torch.cat([weight[:, :-1], rest / total], 1)


def _solve(moments: Moments, old: Tensor, ridge: float, free_bias: bool) -> Tensor:
    """Return the weights for a ridge, as a share of the mean squared input, (G, n, o).

    With a free bias, the ridge leaves out the last input. A group that has no solution,
    as one that reads zeros alone, keeps its weights.
    """
    if free_bias:
        old = _with_best_bias(moments, old)
    held = slice(0, -1) if free_bias else slice(None)
    diagonal = moments.xx.diagonal(dim1=1, dim2=2)[:, held]
    damped = moments.xx.clone()
    added = ridge * diagonal.mean(1, keepdim=True)
    damped.diagonal(dim1=1, dim2=2)[:, held].add_(added)
    factor, failed = torch.linalg.cholesky_ex(damped)
    moved = torch.cholesky_solve(moments.xy - moments.xx @ old, factor)
    usable = (failed == 0) & moved.flatten(1).isfinite().all(1)
    return old + torch.where(usable[:, None, None], moved, 0.0)
