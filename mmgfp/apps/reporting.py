"""The report that a command leaves in its folder when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmgfp.apps.cli import one_line
from mmgfp.report.gallery import Gallery
from mmgfp.report.page import write_report
from mmgfp.report.run import read_runs
from mmgfp.utils.errors import MMGFPError

#: The file, below the work directory.
NAME = 'report.html'


def report_on(folder: Path, draw: Callable[[], Gallery | None]) -> list[str]:
    """Write a report on what a folder holds; say in a line what it has to do without.

    What the report is about is there already, so no failure is one of the command.

    Args:
        folder: The work directory, which gets the file.
        draw: Draws detections, None of models that detect nothing.

    Returns:
        The name of the file; nothing without it, as where its packages are missing.
    """
    print('writing the report', flush=True)
    gallery = None
    try:
        gallery = draw()
    except Exception as error:  # data, models and libraries fail in many ways
        print(f'the report shows no detections: {_reason(error)}')
    try:
        write_report(read_runs([folder]), folder / NAME, gallery)
    except Exception as error:
        print(f'no report: {_reason(error)}')
        return []
    return [NAME]


def _reason(error: Exception) -> str:
    is_complete = isinstance(error, MMGFPError)  # and names what is wrong
    return ' '.join(str(error).split()) if is_complete else one_line(error)
