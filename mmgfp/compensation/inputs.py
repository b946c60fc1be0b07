"""Layers as linear systems: the inputs of each output position, in rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Numbers that rows hold at most while they are worked on, 128 MiB.
CHUNK = 2**24


def unsupported(module: Any) -> str | None:
    """Return why a module cannot be read as a linear system, None if it can."""
    if isinstance(module, LINEAR):
        return None
    if not isinstance(module, TRANSPOSED):
        return f'layers of the kind {type(module).__name__} are not refitted'
    if (
        module.groups == 1
        and tuple(module.stride) == tuple(module.kernel_size)
        and not any(module.padding)
        and not any(module.output_padding)
        and set(module.dilation) == {1}
    ):
        return None
    return 'of transposed convolutions, those of one group without overlap are refitted'


class LinearSystem:
    """A layer, read as y = x W (+ b) at each position, for each group of inputs.

    Args:
        module: A linear layer or a convolution that `unsupported` accepts.
        free_bias: Whether outputs may be shifted, as by the norm that reads them; only
            without a bias.

    Attributes:
        groups: Groups G of a convolution, else 1.
        inputs: Inputs n of a group: channels by taps, and a last one that is always 1
            for a bias, be it free or of the layer.
        outputs: Outputs o of a group.
        free_bias: Whether the bias is free, and left to the norm.

    Examples:
        >>> system = LinearSystem(nn.Conv2d(4, 6, 3, groups=2))
        >>> system.groups, system.inputs, system.outputs
        (2, 19, 3)
        >>> next(system.rows(torch.zeros(5, 4, 8, 8))).shape
        torch.Size([2, 180, 19])
    """

    def __init__(self, module: Any, free_bias: bool = False) -> None:
        self.module = module
        weight = module.weight
        self.groups: int = getattr(module, 'groups', 1)
        self.is_transposed = isinstance(module, TRANSPOSED)
        # A transposed convolution has one bias for all outputs that a position makes.
        self._has_bias = module.bias is not None and not self.is_transposed
        self.free_bias = free_bias and not self._has_bias
        self._has_ones = self._has_bias or self.free_bias
        if self.is_transposed:
            inputs = weight.shape[0] // self.groups
        else:
            inputs = weight[0].numel()
        self.inputs: int = inputs + self._has_ones
        self.outputs: int = weight.numel() // (inputs * self.groups)

    def matrix(self) -> Tensor:
        """Return weights and, as the last row, biases, (G, n, o)."""
        weight = self.module.weight.detach()
        if self.is_transposed:
            matrix = weight.reshape(self.groups, -1, self.outputs)
        else:
            matrix = weight.reshape(self.groups, self.outputs, -1).transpose(1, 2)
        if not self._has_ones:
            return matrix
        bias = matrix.new_zeros(self.groups, 1, self.outputs)
        if self._has_bias:
            bias = self.module.bias.detach().reshape(bias.shape)
        return torch.cat([matrix, bias], 1)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Set weights and biases from a matrix as `matrix` gives it."""
        weight, bias = self.module.weight, self.module.bias
        if self._has_bias:
            bias.copy_(matrix[:, -1].reshape(bias.shape))
        if self._has_ones:
            matrix = matrix[:, :-1]
        if not self.is_transposed:
            matrix = matrix.transpose(1, 2)
        weight.copy_(matrix.reshape(weight.shape))

    def blocks(self, size: int) -> list[Tensor]:
        """Return the inputs in as few blocks of one size or less as hold them all.

        Each has the last input as well, where that is always 1, as biases suit all.
        """
        ones = int(self._has_ones)
        columns = torch.arange(self.inputs - ones)
        count = -(-len(columns) // max(1, size - ones))
        last = torch.arange(self.inputs - ones, self.inputs)
        return [torch.cat([part, last]) for part in columns.tensor_split(count)]

    def targets(self, y: Tensor) -> Tensor:
        """Return what `matrix` shall give at each position for an output, (G, P, o)."""
        if self.is_transposed and self.module.bias is not None:
            bias = self.module.bias.detach()
            y = y - bias.reshape(-1, *[1] * len(self.module.kernel_size))
        return self.by_position(y)

    def by_position(self, y: Tensor) -> Tensor:
        """Return outputs of the layer, or their gradients, by position, (G, P, o)."""
        if isinstance(self.module, nn.Linear):
            return y.reshape(1, -1, self.outputs)
        y = self._batched(y)
        if self.is_transposed:
            for dim, size in enumerate(self.module.kernel_size, 2):
                y = y.unfold(dim, size, size)
        dims = len(self.module.kernel_size)
        return self._grouped(y).flatten(2 + dims).flatten(1, 1 + dims)

    def rows(self, x: Tensor, index: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the inputs of each position, (G, P, n), in parts of bounded size.

        Args:
            x: What the layer is called with.
            index: Numbers of positions, (P,); all in order if None.
        """
        parts = self._parts(x)  # positions first: (N, ..., G, inputs ...)
        positions = parts.shape[: -self._row_dims]
        if index is None:
            index = torch.arange(math.prod(positions), device=x.device)
        step = max(1, CHUNK // (self.groups * self.inputs))
        for chunk in index.split(step):
            rows = parts[torch.unravel_index(chunk, positions)]
            rows = rows.reshape(len(chunk), self.groups, -1).movedim(1, 0)
            if self._has_ones:
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
            yield rows

    def count(self, x: Tensor) -> int:
        """Return the number of positions of an input, P."""
        return math.prod(self._parts(x).shape[: -self._row_dims])

    @property
    def _row_dims(self) -> int:
        if isinstance(self.module, nn.Linear):
            return 1
        return 2 if self.is_transposed else 2 + len(self.module.kernel_size)

    def _parts(self, x: Tensor) -> Tensor:
        """Return a view of the input, by position: (N, ..., G, channels, taps ...)."""
        module = self.module
        if isinstance(module, nn.Linear):
            return x if x.dim() > 1 else x[None]
        x = self._batched(x)
        if not self.is_transposed:
            x = _padded(module, x)
            geometry = module.kernel_size, module.stride, module.dilation
            for dim, (size, stride, dilation) in enumerate(
                zip(*geometry, strict=True), 2
            ):
                x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return self._grouped(x).movedim(0, len(module.kernel_size) + 1)

    def _grouped(self, x: Tensor) -> Tensor:
        """Turn (N, C, positions ..., taps ...) to (G, N, positions ..., C / G, taps).

        Positions and taps have as many dimensions as the kernel, or none.
        """
        positions = len(self.module.kernel_size)
        x = x.unflatten(1, (self.groups, -1)).movedim(1, 0)
        return x.movedim(2, 2 + positions)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.module.kernel_size) + 2 else x[None]


@dataclass
class Block:
    """Some inputs of a layer, fitted to what the others leave of its outputs.

    Attributes:
        columns: Numbers of its inputs, (b,).
        others: The layer's matrix with zeros for them, (G, n, o), in double precision.
    """

    columns: Tensor
    others: Tensor

    @classmethod
    def of(cls, columns: Tensor, matrix: Tensor) -> Block:
        """Return the block of a layer that has this matrix, (G, n, o)."""
        columns = columns.to(matrix.device)
        return cls(columns, matrix.double().index_fill(1, columns, 0.0))

    def split(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return its part of x (G, P, n), and what it shall give of y (G, P, o)."""
        if len(self.columns) == x.shape[2]:
            return x, y
        return x[..., self.columns], y - x.double() @ self.others


def _padded(conv: Any, x: Tensor) -> Tensor:
    """Return the input of a convolution with its padding around it."""
    if isinstance(conv.padding, str):
        pads = list(conv._reversed_padding_repeated_twice)
    else:
        pads = [p for p in reversed(conv.padding) for _ in range(2)]
    if not any(pads):
        return x
    mode = 'constant' if conv.padding_mode == 'zeros' else conv.padding_mode
    return F.pad(x, pads, mode)
