"""SIGTERM during training, such as a scheduler sends before it takes a machine back."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.engine.checkpoints import ATOMIC_BACKEND
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
        self._previous_handler: Any = None

    def before_train(self, runner: Runner) -> None:
        """Start to listen."""
        # Python lets no other thread set a handler.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._note)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and leave if that is agreed on."""
        if self.agreed:
            path = save_for_resuming(runner)
            runner.logger.warning(
                f'asked to end (SIGTERM): saved {path}; go on with --resume'
            )
            barrier()  # a launcher ends all processes as soon as one has left
            self.after_train(runner)
            raise SystemExit(EXIT_STATUS)

    def after_train(self, runner: Runner) -> None:
        """Stop listening: SIGTERM does again what it did before."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

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
