"""Contexts that hold while a runner trains, whichever way training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mmengine.runner import BaseLoop, Runner


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


@contextmanager
def warnings_in_log(log: logging.Logger) -> Iterator[None]:
    """Let mmgfp's own logger write to the log file of a run.

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
        yield
    finally:
        for handler in shared:
            logger.removeHandler(handler)
