"""The options of compensation, each written once."""

from __future__ import annotations

from dataclasses import dataclass

from mmgfp.compensation.refit import RIDGES
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check, check_count

METHODS = ('fisher', 'least_squares', 'bn')
NORMS = ('all', 'others', 'none')
#: Positions of a batch that a layer is fitted to where there are many batches: second
#: moments of more of them would take most of the time.
FEW_ROWS = 4096


@dataclass(frozen=True)
class CompensationConfig:
    """How a compact model is made up for what it lost, checked when it is given.

    Attributes:
        method: ``'fisher'`` weighs the error at each position by the squared gradient
            of the loss there, ``'least_squares'`` counts all alike, ``'bn'`` only moves
            the statistics of batch norms (`mmgfp.compensation.norms`).
        one_pass: Refit all layers to the moments of the original model, which one pass
            over the batches gives; otherwise one after the other, to what the compact
            model gives them, which is better and takes several passes.
        uniform: Candidates for the share in which ``'fisher'`` counts all positions
            alike; errors on held-out batches are weighed by the first one.
        held_out: The share of batches by which ridges are chosen.
        ridges: Ridges that are tried, as shares of the mean squared input.
        rows: Positions of a batch that a layer is fitted to; where there are more, a
            sample by their weights.
        max_inputs: Layers with more inputs (channels by taps) are refitted in blocks of
            so many or less, one after the other.
        memory: Bytes that moments, outputs of the original model at sampled rows, and
            all of them while it runs may take, a third each; more where those of one
            layer do.
        norms: Whose statistics are moved: of ``'all'`` batch norms whose inputs
            change, of the ``'others'``, which do not read refitted layers alone, or of
            ``'none'``.

    Raises:
        ConfigError: If an option is out of range.

    Examples:
        >>> CompensationConfig(method='least_squares').shares
        ((1.0,),)
        >>> CompensationConfig().shares
        ((0.95, 0.05), (0.7, 0.3), (0.0, 1.0))
    """

    method: str = 'fisher'
    one_pass: bool = False
    uniform: tuple[float, ...] = (0.05, 0.3, 1.0)
    held_out: float = 0.25
    ridges: tuple[float, ...] = RIDGES
    rows: int = 16384
    max_inputs: int = 5120
    memory: int = 2**30
    norms: str = 'others'

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                'method', f'one of {METHODS}', repr(self.method), "use 'fisher'"
            )
        check('norms', self.norms in NORMS, f'one of {NORMS}', self.norms)
        check('held_out', 0 < self.held_out < 1, 'between 0 and 1', self.held_out)
        for name in ('uniform', 'ridges'):
            values = getattr(self, name)
            most = 1 if name == 'uniform' else float('inf')
            are_valid = bool(values) and all(0 < v <= most for v in values)
            check(name, are_valid, f'several numbers in (0, {most}]', values)
        for name in ('rows', 'max_inputs', 'memory'):
            check_count(name, getattr(self, name))

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Candidates for the shares of squared gradients, if any, and of all alike."""
        if self.method == 'fisher':
            return tuple((1 - share, share) for share in self.uniform)
        return ((1.0,),)
