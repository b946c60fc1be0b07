"""Copies of a model to compare, with parameters set at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmgfp.utils.precision import InDouble
from mmgfp.utils.trial_runs import (
    LossFunction,
    copy_module,
    is_out_of_memory,
    seed_all,
    undisturbed,
)

T = TypeVar('T')

#: Parameters none of which is larger start (almost) at zero and hide what they scale.
SMALL = 1e-3
#: Largest relative difference of training losses that still counts as equal: less than
#: for outputs, since a loss sums up many values, which dilutes a difference.
LOSS_TOLERANCE = 1e-6


def needs_double(model: nn.Module) -> bool:
    """Return whether any part is in double precision, so that single may lose values.

    Examples:
        >>> needs_double(nn.Linear(2, 2)), needs_double(nn.Linear(2, 2).double())
        (False, True)
    """
    tensors = [*model.parameters(), *model.buffers()]
    return any(t.dtype == torch.float64 for t in tensors)


@torch.no_grad()
def random_probe(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that is blind to no channel.

    It is in single precision, or in double where the model `needs_double`. Biases,
    norms and their statistics, and what starts near zero, are set at random.
    """
    probe = copy_module(model)
    probe = probe.double() if needs_double(model) else probe.float()
    probe.eval()  # returns nothing where distillation overrides it
    _randomize_vectors(probe)
    _randomize_small(probe)
    return probe


def run(
    model: nn.Module,
    call: Callable[[nn.Module], T],
    seed: int = 0,
    in_double: bool = True,
) -> T:
    """Return ``call(model)``, computed with the same random numbers at each call."""
    with undisturbed(model), InDouble() if in_double else nullcontext():
        seed_all(seed)
        return call(model)


def error_line(error: Exception) -> str:
    """Return an error as one line.

    Raises:
        Exception: The error itself if memory ran out, which is no fault of the groups.
    """
    if is_out_of_memory(error):
        raise error
    return f'{type(error).__name__}: {error}'.splitlines()[0]


class TrainingCheck:
    """Compares the training losses of a masked and of a compact copy of a model.

    Only they show code that runs in training mode alone. Dropout modules are off, as
    they draw other numbers for other widths. Where a loss still depends on random
    numbers, or on the last bits as between equally good candidates, it only has to run.
    Copies are put into double precision.

    Args:
        model: The model, whose modules are in the modes in which it trains.
        loss: Its training loss.
    """

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        self._loss = loss
        dropout = nn.modules.dropout._DropoutNd
        self._training = {
            name
            for name, module in model.named_modules()
            if module.training and not isinstance(module, dropout)
        }

    def runs(self, masked: nn.Module, small: nn.Module) -> str | None:
        """Return the error that the compact copy raises and the masked one does not."""
        error = self._error(small.double())
        if error is None or self._error(masked.double()) is not None:
            return None
        return f'in training mode, {error_line(error)}'

    def agrees(self, masked: nn.Module, small: nn.Module) -> str | None:
        """Return how the losses differ, for reasons that only the groups explain."""
        expected = self._value(masked.double())
        if isinstance(expected, Exception) or not math.isfinite(expected):
            return None
        value = self._value(small.double())
        if isinstance(value, Exception):
            return f'in training mode, {error_line(value)}'
        if _is_close(value, expected):
            return None
        for seed in (1, 2, 3):
            _nudge(masked, seed)
            again = self._value(masked, seed)
            if isinstance(again, Exception) or not _is_close(again, expected):
                return None
        return f'training losses differ ({value:.6g} instead of {expected:.6g})'

    def _error(self, model: nn.Module) -> Exception | None:
        """Return the error that the training loss raises in either precision."""
        value = self._value(model)
        if isinstance(value, float):
            return None
        # Some ops refuse a batch in single precision beside a model in double.
        model.float()
        again = self._value(model, in_double=False)
        model.double()
        return again if isinstance(again, Exception) else None

    @torch.no_grad()
    def _value(
        self, model: nn.Module, seed: int = 0, in_double: bool = True
    ) -> float | Exception:
        """Return the training loss, or the error that it raises."""

        def loss(model: nn.Module) -> Tensor:
            for name, module in model.named_modules():
                module.training = name in self._training
            return self._loss(model)

        try:
            return float(run(model, loss, seed, in_double))
        except Exception as error:
            error_line(error)  # raises it if memory ran out
            return error


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= LOSS_TOLERANCE * max(abs(b), 1e-12)


@torch.no_grad()
def _nudge(model: nn.Module, seed: int) -> None:
    """Change the last digits of all parameters; zeros remain, and so does the mask."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.rand(
            parameter.shape, generator=generator, dtype=torch.float64, device='cpu'
        )
        parameter.mul_(1 + 1e-11 * (noise.to(parameter.device) - 0.5))


def _randomize_vectors(model: nn.Module) -> None:
    """Set biases, norms and their statistics at random.

    A norm that starts at zero, as at the end of a residual branch, would hide what
    comes before it.
    """
    generator = torch.Generator().manual_seed(0)
    buffers = {name for name, _ in model.named_buffers()}
    affine = ('weight', 'bias', 'gamma', 'beta')
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() != 1 or not tensor.is_floating_point():
            continue
        noise = torch.rand(
            tensor.shape, generator=generator, dtype=torch.float64, device='cpu'
        )
        noise = noise.to(tensor.device)
        if name.endswith('running_var'):  # scaled: else activations may overflow
            tensor.mul_(noise + 0.5).clamp_(min=1e-3)
        elif name.endswith('running_mean'):
            tensor.add_((noise - 0.5) * 0.2)
        elif name in buffers and not name.endswith(affine):
            tensor.mul_(noise + 0.5)  # which may be a variance, or must stay zero
        else:
            positive = name.endswith(('weight', 'gamma'))
            tensor.copy_(noise + 0.5 if positive else (noise - 0.5) * 0.2)


def _randomize_small(model: nn.Module) -> None:
    """Set other parameters at random that start (almost) at zero, of any shape.

    Such are layer scales, gates of residual branches, and the last layer of a branch.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.numel() or parameter.is_complex():
            continue
        if parameter.abs().max() > SMALL:
            continue
        noise = torch.rand(
            parameter.shape, generator=generator, dtype=torch.float64, device='cpu'
        )
        noise = noise.to(parameter.device)
        is_scale = parameter.numel() == max(parameter.shape, default=1)
        if is_scale:
            parameter.copy_(noise + 0.5)
        else:
            fan_in = parameter.numel() // len(parameter)
            parameter.copy_((noise - 0.5) / fan_in**0.5)
