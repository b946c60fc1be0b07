"""Other readings of code that splits channels, tried where verification fails."""

from __future__ import annotations

from collections.abc import Sequence

from mmgfp.groups import ChannelGroup
from mmgfp.tracing import Trace
from mmgfp.tracing.splits import Readings, Split


class ReadingTrials:
    """Tries each reading of a split once, and comes back to the default in the end."""

    def __init__(self) -> None:
        self._untried: dict[Split, list[int | None]] = {}
        self._readings: dict[Split, int | None] = {}

    def next_readings(
        self, trace: Trace, failed: Sequence[ChannelGroup]
    ) -> Readings | None:
        """Return readings with which to trace the loss again.

        Args:
            trace: The trace that the groups are from.
            failed: Groups that failed verification.

        Returns:
            Readings: None if the groups hold no split, or all readings were tried.
        """
        members = {m.name for group in failed for m in group.members}
        changed = False
        for split in trace.splits.labels:
            if members.isdisjoint(split.tensors):
                continue
            current = trace.splits.readings.get(split, split.default)
            rest = self._untried.setdefault(
                split, [r for r in (*split.others, split.default) if r != current]
            )
            if rest:
                self._readings[split] = rest.pop(0)
                changed = True
        return dict(self._readings) if changed else None
