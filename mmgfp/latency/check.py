"""How far predictions are from what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A cut that was predicted and measured.

    Attributes:
        macs: Its share of the MACs.
        predicted: Milliseconds.
        measured: Milliseconds.
        whole: Milliseconds of the whole model, predicted and measured.
    """

    macs: float
    predicted: float
    measured: float
    whole: tuple[float, float]

    @property
    def error(self) -> float:
        """How much too high the prediction is, as a share."""
        return self.predicted / self.measured - 1

    @property
    def ratio_error(self) -> float:
        """The same of the share of the whole model's time, which a target means."""
        predicted, measured = self.whole
        return (self.predicted / predicted) / (self.measured / measured) - 1
