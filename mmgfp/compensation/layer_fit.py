"""The refitting of one layer, at once or block by block of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mmgfp.compensation.inputs import Block
from mmgfp.compensation.options import CompensationConfig
from mmgfp.compensation.refit import Moments, Refit, refit
from mmgfp.compensation.reports import LayerReport
from mmgfp.compensation.sampling import Target, add_call
from mmgfp.compensation.survey import Layer

UNPAIRED = 'it works on other rows in the compact model than in the original'


class LayerFit:
    """A layer that is being refitted.

    A layer with many inputs is fitted in blocks of them, each to what the others leave
    of its outputs (block coordinate descent): second moments of all of them would grow
    with their square, and the time to solve for them with their cube.

    Args:
        layer: The layer.
        config: The options.

    Attributes:
        blocks: Numbers of the inputs in each block.
        reason: Why the layer must stay as it is, None so far.
    """

    def __init__(self, layer: Layer, config: CompensationConfig) -> None:
        self.layer, self.config = layer, config
        self.system = layer.system
        self.blocks = self.system.blocks(config.max_inputs)
        self.reason: str | None = None
        self._matrix = self.system.matrix().double()  # with the blocks that are done
        self._results: list[Refit] = []
        self._block = Block.of(self.blocks[0], self._matrix)
        self._fit: list[Moments] = []
        self._held_out: list[Moments] = []

    @property
    def nbytes(self) -> int:
        """Memory that the moments of a block take."""
        return 2 * sum(moments.nbytes for moments in self._empty('meta'))

    def begin(self) -> None:
        """Begin to gather the moments of the next block."""
        columns = self.blocks[len(self._results)]
        self._block = Block.of(columns, self._matrix)
        self._fit = self._empty(self._matrix.device)
        self._held_out = self._empty(self._matrix.device)

    def _empty(self, device: torch.device | str) -> list[Moments]:
        """Return empty moments for each way to weigh positions."""
        size = len(self._block.columns)
        sizes = (self.system.groups, size, self.system.outputs, device)
        return [Moments(*sizes) for _ in self.config.shares[0]]

    def add(self, x: Tensor, target: Target | None, held_out: bool) -> None:
        """Add a call on a batch, given its input and what it should give."""
        if target is None or target.count != self.system.count(x):
            self.reason = UNPAIRED
            return
        moments = self._held_out if held_out else self._fit
        add_call(moments, self.system, x, target, self._block)

    def solve(self) -> None:
        """Fit the block to the moments that were gathered."""
        columns, config = self._block.columns, self.config
        old = self._matrix[:, columns]
        options = (config.ridges, config.shares, self.system.free_bias)
        result = refit(self._fit, self._held_out, old, *options)
        self._fit = self._held_out = []
        self._results.append(result)
        if result.weight is not None:
            self._matrix[:, columns] = result.weight

    def finish(self) -> Tensor | None:
        """Write what was found; return the layer's matrix, None if it stays."""
        if self.report.reason is not None:
            return None
        self.system.write(self._matrix)
        return self._matrix

    @property
    def report(self) -> LayerReport:
        """The outcome for the layer."""
        if self.reason is not None:
            return LayerReport(self.layer.weight, reason=self.reason)
        first, last = self._results[0], self._results[-1]
        refitted = [r for r in self._results if r.weight is not None]
        chosen = refitted[-1] if refitted else first
        return LayerReport(
            self.layer.weight,
            first.before,
            last.after,
            chosen.ridge,
            chosen.shares[-1] if chosen.shares else None,
            chosen.reason,
        )
