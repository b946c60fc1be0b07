"""Readings of code that splits channels into several dimensions.

``x.view(N, 4, C // 4)`` has a fixed number of parts, ``x.view(N, C // 4, 4)`` parts of
a fixed width. With 16 channels the graph of both is the same, so that what becomes of
the parts in a smaller model has to be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmgfp.tracing.tracer import Trace


@dataclass(frozen=True)
class Split:
    """Channels that code splits into several dimensions.

    Attributes:
        tensors: Names of the parameters whose channels they are.
        sizes: Sizes of the dimensions, such as (4, 8) for four parts of eight.
        rows: The tensor has dimensions beside images and channels. If so, the last of
            ``sizes`` gets smaller unless a reading says otherwise; else all may.
    """

    tensors: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: bool = True

    @property
    def default(self) -> int | None:
        """The reading of code that nothing is known about."""
        return len(self.sizes) - 1 if self.rows else None

    @property
    def others(self) -> list[int]:
        """All other readings, in the order in which they are to be tried."""
        return [i for i in range(len(self.sizes)) if i != self.default]


#: Which of the sizes of a split gets smaller with fewer channels; all others are fixed.
#: None where single channels may go.
Readings = Mapping[Split, int | None]


@dataclass
class Splits:
    """The splits that a pass over the graph meets.

    Attributes:
        readings: How to read them, where this is not the default.
        labels: Labels of the channels of each.
    """

    readings: Readings = field(default_factory=dict)
    labels: dict[Split, Tensor] = field(default_factory=dict)

    def read(self, split: Split, labels: Tensor) -> int | None:
        """Note a split; return which of its sizes gets smaller."""
        flat = labels.reshape(-1)
        flat = flat[flat >= 0]
        if split in self.labels:
            flat = torch.cat([self.labels[split], flat])
        self.labels[split] = flat.unique()
        return self.readings.get(split, split.default)


def with_loose_splits(
    retrace: Callable[[Readings], Trace], readings: Readings
) -> Trace:
    """Return a trace in which as many splits as possible have channels that may go.

    Args:
        retrace: Traces a graph with the readings that it is given.
        readings: Readings that are not to be changed.
    """
    trace = retrace(readings)
    stuck = [s for s in _stuck(trace) if s not in readings]
    for turn in range(max((len(s.others) for s in stuck), default=0)):
        tried = {s: s.others[turn] for s in stuck if turn < len(s.others)}
        trial = retrace({**trace.splits.readings, **tried})
        still = set(_stuck(trial))
        loose = {s: reading for s, reading in tried.items() if s not in still}
        if loose:
            # A reading that does not help must not change anything.
            helped = len(loose) == len(tried)
            trace = trial if helped else retrace({**trace.splits.readings, **loose})
            stuck = [s for s in stuck if s not in loose]
    return trace


def _stuck(trace: Trace) -> list[Split]:
    """Return the splits none of whose channels may go."""
    if not trace.splits.labels:
        return []
    table = trace.table
    of_label = table.components()
    loose = np.zeros(of_label.max(initial=-1) + 1, dtype=bool)
    loose[of_label[table.consumed()]] = True
    loose[list(table.frozen(of_label))] = False
    for labels in table.vectors.values():
        component = of_label[labels.numpy()]
        if (component == component[0]).all():  # nothing would remain of it
            loose[component[0]] = False
    return [
        split
        for split, labels in trace.splits.labels.items()
        if not loose[of_label[labels.numpy()]].any()
    ]
