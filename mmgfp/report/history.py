"""What a run logged while it trained, as MMEngine's local visualizer keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmgfp.selection.costs import COSTS
from mmgfp.utils.errors import ConfigError

#: Where MMEngine writes scalars, below the work directory.
SCALARS = '*/vis_data/scalars.json'

Points = dict[int, float]


@dataclass(frozen=True)
class History:
    """Scalars of a run by their names, each by the step in which it was logged.

    Attributes:
        series: Values by step, in ascending order. Steps are iterations, but those of
            a validation are epochs where the run counts in epochs.
    """

    series: dict[str, Points] = field(default_factory=dict)

    @property
    def loss(self) -> Points:
        """The training loss."""
        return self.series.get('loss', {})

    @property
    def shares(self) -> dict[str, Points]:
        """The remaining share of each cost of `COSTS`, where it was logged."""
        keys = {name: f'pruning/{name}_ratio' for name in COSTS.names()}
        return {n: self.series[key] for n, key in keys.items() if key in self.series}


def read_history(folder: Path) -> History:
    """Read the scalars of all runs in a work directory, as one.

    A later run there replaces what an earlier one logged from its first step on, as a
    run that was killed and resumed does some iterations again. One whose loss was
    logged as early as theirs has begun anew: nothing of them is left.

    Raises:
        ConfigError: If a file cannot be read.
    """
    series: dict[str, Points] = {}
    for path in sorted(folder.glob(SCALARS)):  # their folders are named by the time
        later = _scalars(path)
        if _begins_anew(later, series):
            series = {}
        for name, points in later.items():
            first = min(points)
            before = {s: v for s, v in series.get(name, {}).items() if s < first}
            series[name] = before | dict(sorted(points.items()))
    return History(series)


def _begins_anew(later: Mapping[str, Points], before: Mapping[str, Points]) -> bool:
    """Return whether a run in the folder of others is one that resumes none of them."""
    if not (later.get('loss') and before.get('loss')):
        return False
    return min(later['loss']) <= min(before['loss'])


def _scalars(path: Path) -> dict[str, Points]:
    series: dict[str, Points] = {}
    try:
        for row in _rows(path.read_text().splitlines()):
            for name, value in row.items():
                if name != 'step' and math.isfinite(value):
                    series.setdefault(name, {})[row['step']] = value
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            str(path),
            "lines of JSON with numbers and a 'step'",
            f'{type(error).__name__}: {error}',
            'move it away to do without it',
        ) from error
    return series


def _rows(lines: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    lines = list(lines)
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):  # the last one is cut short if the run was killed
                raise
