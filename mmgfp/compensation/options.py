"""The options of compensation, each written once."""

from __future__ import annotations

from dataclasses import dataclass

from mmgfp.compensation.refit import RIDGES
from mmgfp.utils.errors import ConfigError

METHODS = ('fisher', 'least_squares', 'bn')


@dataclass(frozen=True)
class CompensationConfig:
    """How a compact model is made up for what it lost, checked when it is given.

    Attributes:
        method: ``'fisher'`` weighs the error at each position by the squared gradient
            of the loss there, ``'least_squares'`` counts all alike, ``'bn'`` only takes
            the statistics of batch norms anew.
        one_pass: Refit all layers to the moments of the original model, which one pass
            over the batches gives; otherwise one after the other, to what the compact
            model gives them, which is better and takes several passes.
        uniform: The share of ``'fisher'`` in which all positions count alike.
        held_out: The share of batches by which ridges are chosen.
        ridges: Ridges that are tried, as shares of the mean squared input.
        rows: Positions of a batch that a layer is fitted to; where there are more, a
            sample by their weights.
        max_inputs: Layers with more inputs (channels by taps) are left alone.
        memory: Bytes that moments, and outputs of the original model, may take.
        norms: Whether the statistics of batch norms are taken anew.

    Raises:
        ConfigError: If an option is out of range.

    Examples:
        >>> CompensationConfig(method='least_squares').uniform
        0.05
    """

    method: str = 'fisher'
    one_pass: bool = False
    uniform: float = 0.05
    held_out: float = 0.25
    ridges: tuple[float, ...] = RIDGES
    rows: int = 16384
    max_inputs: int = 8192
    memory: int = 2**30
    norms: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                'method', f'one of {METHODS}', repr(self.method), "use 'fisher'"
            )
        for name in ('uniform', 'held_out'):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(name, 'between 0 and 1', repr(value), 'change it')
        for name in ('rows', 'max_inputs', 'memory'):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(name, 'at least 1', repr(value), 'change it')
