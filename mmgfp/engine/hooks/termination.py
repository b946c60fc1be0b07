"""SIGTERM during training, such as a scheduler sends before it takes a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.engine.checkpoints import ATOMIC_BACKEND
from mmgfp.engine.train_scope import during_training
from mmgfp.utils.io import atomic_write

#: The exit status that a shell gives to a process ended by SIGTERM.
EXIT_STATUS = 128 + signal.SIGTERM


class Termination(Hook):
    """Notes SIGTERM instead of dying of it; saves and leaves once that is agreed on.

    A part of `ExactResumeHook`, which acts earlier in an iteration.

    Attributes:
        requested: Whether SIGTERM came.
        agreed: Whether all processes end after this iteration.
    """

    #: After all other hooks, so that the checkpoint holds what they did.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False

    def before_run(self, runner: Runner) -> None:
        """Listen while the runner trains; then SIGTERM does again what it did."""
        during_training(runner, self._listening)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        self.requested = self.agreed = False  # of another run
        # Python lets no other thread set a handler.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            # None is a handler that was not set by Python, which cannot set it again.
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and leave if that is agreed on."""
        if self.agreed:
            path = save_for_resuming(runner)
            runner.logger.warning(
                f'asked to end (SIGTERM): saved {path}; go on with --resume'
            )
            barrier()  # a launcher ends all processes as soon as one has left
            raise SystemExit(EXIT_STATUS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def save_for_resuming(runner: Runner) -> Path:
    """Write a checkpoint in `after_train_iter`, from which ``--resume`` goes on."""
    path = Path(runner.work_dir, f'iter_{runner.iter + 1}.pth')
    runner.save_checkpoint(
        str(path.parent), path.name, by_epoch=False, backend_args=ATOMIC_BACKEND
    )
    if is_main_process():
        note = path.with_name('last_checkpoint')
        atomic_write(note, lambda tmp: tmp.write_text(str(path)))
    return path
