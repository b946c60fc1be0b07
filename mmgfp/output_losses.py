"""Losses for images without labels: the distance to a model's own outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmgfp.compensation.recording import evaluating
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import (
    Forward,
    LossFunction,
    all_parameters_require_grad,
    undisturbed,
)


def output_losses(
    model: nn.Module, forwards: Sequence[Forward], seed: int = 0
) -> list[LossFunction]:
    """Return losses for images without labels: the distance to the model's own outputs.

    A distance has no gradient where it is zero. Instead, each loss is a sum of outputs
    with random signs: its squared gradient is on average the curvature of the squared
    distance, each tensor's as a share of its own square (Hutchinson's estimate of a
    Gauss-Newton diagonal; Martens and Grosse, 2015, arXiv 1503.05671, section 2).

    Args:
        model: The unpruned model; it is left as it is.
        forwards: Return all outputs that a model has for one batch each, always the
            same one. They have the same shapes for the compact model.
        seed: Number from which signs are drawn.

    Raises:
        ConfigError: If an output of the model depends on none of its parameters.

    Examples:
        >>> net, x = nn.Linear(3, 2), torch.ones(4, 3)
        >>> (loss,) = output_losses(net, [lambda m: m(x)])
        >>> loss(net).shape
        torch.Size([])
    """
    seeds = range(seed, seed + len(forwards))
    return [_OutputLoss(model, *each) for each in zip(forwards, seeds, strict=True)]


class _OutputLoss:
    """A sum of a model's outputs with random signs, each tensor by its norm.

    Signs are drawn anew in each call, as those of many batches would fill the memory.
    """

    def __init__(self, model: nn.Module, forward: Forward, seed: int) -> None:
        self._forward, self._seed = forward, seed
        with (
            undisturbed(model),
            evaluating(model),
            all_parameters_require_grad(model),
            torch.enable_grad(),
        ):
            outputs = list(tree_tensors(forward(model)))
        without = sum(not y.requires_grad for y in outputs)
        if without or not outputs:
            raise ConfigError(
                'outputs',
                'tensors that gradients can be taken of',
                f'{without} of {len(outputs)} without',
                'give those before post-processing',
            )
        self._norms = [float(y.detach().double().norm()) for y in outputs]
        endless = sum(not math.isfinite(norm) for norm in self._norms)
        if endless:
            raise ConfigError(
                'outputs',
                'finite',
                f'NaN or infinity in {endless} of {len(outputs)}',
                'give those before anything is masked by infinity',
            )

    def __call__(self, model: nn.Module) -> Tensor:
        outputs = tree_tensors(self._forward(model))
        generator = torch.Generator().manual_seed(self._seed)
        sums = []
        for y, norm in zip(outputs, self._norms, strict=True):
            signs = torch.randint(2, y.shape, generator=generator, dtype=torch.int8)
            signs = (signs * 2 - 1).to(y)
            # Nothing but zeros has no share: it counts as it is, with finite gradients.
            sums.append((signs * y).sum() / (norm or 1.0))
        return torch.stack(sums).sum()
