"""The step that a tool is at, on the error stream of terminals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn

from mmgfp.compensation.reports import refitting_text
from mmgfp.rounds import Round
from mmgfp.utils.steps import told_to
from mmgfp.utils.trial_runs import LossFunction


class Steps:
    """A line about the work at hand, which terminals show, and lines that stay."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task('starting', total=None)

    def begin(self, line: str, total: int | None = None) -> None:
        """Show another line, and count batches or other parts from zero."""
        self._progress.reset(self._task, description=line, total=total)

    def advance(self) -> None:
        """Count a part."""
        self._progress.advance(self._task)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(line, highlight=False, markup=False)


@contextmanager
def shown_steps() -> Iterator[Steps]:
    """Show steps while the block runs, those of `mmgfp.utils.steps` among them."""
    columns = (
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, soft_wrap=True)
    is_silent = not console.is_terminal  # a log has the lines that stay
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=is_silent,
        refresh_per_second=4,  # few, as some of the work is timed
    ) as progress:
        steps = Steps(progress)
        with told_to(steps):
            yield steps


class CountedLoss:
    """A loss whose calls are shown."""

    def __init__(self, loss: LossFunction, steps: Steps) -> None:
        self._loss, self._steps = loss, steps

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the loss of a model."""
        self._steps.advance()
        return self._loss(model)


def round_line(number: int, done: Round, seconds: float) -> str:
    """Return a line about a round that has ended.

    Args:
        number: How many rounds have ended.
        done: The round.
        seconds: How long pruning has taken so far.
    """
    parts = [f'cut {number}: {done.share:.1%} of {done.target.cost}']
    if done.layers:
        parts.append(refitting_text(done.layers))
    return f'{", ".join(parts)}, {seconds / 60:.1f} min so far'
