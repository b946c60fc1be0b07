"""Contexts that hold while a runner trains, whichever way training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mmengine.runner import BaseLoop, Runner

from mmgfp.utils.steps import told_to


def during_training(
    runner: Runner, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Enter a context when training starts, and leave it when training ends.

    A hook calls this in `before_run`. After an error or Ctrl-C MMEngine calls no hook
    any more, so `after_train` is no place to undo what concerns the whole process.

    Args:
        runner: The runner; nothing happens if it only tests.
        context: Returns the context.
    """
    loop = runner._train_loop  # the property would build the loop of a test run
    if not isinstance(loop, BaseLoop):
        return
    run = loop.run

    def run_in_context() -> Any:
        vars(loop).pop('run', None)  # another run of this loop begins without it
        with context():
            return run()

    loop.run = run_in_context


class _LoggedSteps:
    """A line of the log for each step."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def begin(self, line: str, total: int | None = None) -> None:
        self._log.info(line)

    def advance(self) -> None:
        pass


@contextmanager
def told_in_log(log: logging.Logger) -> Iterator[None]:
    """Let the log of a run have the warnings of mmgfp, and what long work is at.

    The run's console handler comes along only where the warnings would not reach a
    console otherwise: each of them is printed once.

    Args:
        log: The runner's logger.
    """
    logger = logging.getLogger('mmgfp')
    shared = [
        handler
        for handler in log.handlers
        if handler not in logger.handlers
        and (isinstance(handler, logging.FileHandler) or not logger.hasHandlers())
    ]
    for handler in shared:
        logger.addHandler(handler)
    try:
        with told_to(_LoggedSteps(log)):
            yield
    finally:
        for handler in shared:
            logger.removeHandler(handler)
