"""Rendering of runs as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmgfp.report import charts
from mmgfp.report.gallery import Gallery
from mmgfp.report.run import Run
from mmgfp.runtimes.base import require
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import atomic_write
from mmgfp.version import __version__

#: Bytes that a page may have.
MOST_BYTES = 500_000


def write_report(
    runs: Sequence[Run], path: Path, gallery: Gallery | None = None
) -> None:
    """Write a page about some runs.

    Args:
        runs: The runs, each of another name.
        path: The file to write.
        gallery: Detections to show.

    Raises:
        ConfigError: If there are too many runs for one page, or a package is not
            installed.
        SavingError: If it cannot be written.
    """
    text = render(runs, gallery)
    atomic_write(path, lambda tmp: tmp.write_text(text, encoding='utf-8'))


def render(runs: Sequence[Run], gallery: Gallery | None = None) -> str:
    """Return the text of the page.

    Args:
        runs: The runs, each of another name.
        gallery: Detections to show.

    Raises:
        ConfigError: If the page were too large, or a package is not installed.
    """
    # Members of groups are most of the text of a large model.
    for with_members in (True, False):
        text = _page(runs, gallery, with_members)
        size = len(text.encode())
        if size <= MOST_BYTES:
            return text
    raise ConfigError(
        'WORK_DIR',
        f'runs that fit into {MOST_BYTES / 1e3:.0f} kB',
        f'{len(runs)} of them, {size / 1e3:.0f} kB',
        'name fewer',
    )


def _page(runs: Sequence[Run], gallery: Gallery | None, with_members: bool) -> str:
    jinja2: Any = require('jinja2', 'report')
    require('matplotlib', 'report')
    template = files(__package__).joinpath('page.html').read_text(encoding='utf-8')
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [{'run': run, **_charts(run)} for run in runs]
    have_both = [r for r in runs if r.history.loss and r.history.shares.get('macs')]
    return environment.from_string(template).render(
        runs=drawn,
        compared=charts.compared(have_both) if len(have_both) > 1 else '',
        costs=_common_costs(runs),
        gallery=gallery,
        with_members=with_members,
        version=__version__,
    )


def _charts(run: Run) -> dict[str, str]:
    """Draw what there is about a run; the chart of anything else is empty."""
    history = run.history
    is_alike = len({tuple(s.widths) for s in run.snapshots}) == 1
    return {
        'tradeoff': charts.tradeoff(history, run.snapshots) if history.shares else '',
        'channels': charts.channels(run.snapshots) if is_alike else '',
        'finetuning': charts.finetuning(run.finetuning) if run.finetuning.loss else '',
    }


def _common_costs(runs: Sequence[Run]) -> list[Any]:
    """Return all quantities that the file of some pruned model names, in order."""
    costs = [c.quantity for run in runs for s in run.snapshots for c in s.costs]
    return list(dict.fromkeys(costs))
