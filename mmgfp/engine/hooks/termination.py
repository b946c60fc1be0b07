"""A request to end, such as a scheduler's before it takes a machine back."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.engine.checkpoints import WHOLE
from mmgfp.utils.io import atomic_write

#: The exit status that a shell gives to a process ended by SIGTERM.
EXIT_STATUS = 128 + signal.SIGTERM


class Termination(Hook):
    """Notes SIGTERM instead of dying of it; saves and leaves once that is agreed on.

    Attributes:
        requested: Whether it came.
        agreed: Whether all processes end after this iteration.
    """

    #: All others are through with the iteration that is saved.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        self._before: Any = None

    def before_train(self, runner: Runner) -> None:
        """Start to watch; only a process' main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and leave if that is agreed on."""
        if self.agreed:
            path = save_for_resuming(runner)
            runner.logger.warning(
                f'asked to end (SIGTERM): saved {path}; go on with --resume'
            )
            barrier()  # launchers end all processes as soon as one has left
            self.after_train(runner)
            raise SystemExit(EXIT_STATUS)

    def after_train(self, runner: Runner) -> None:
        """Let SIGTERM do again what it did before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def save_for_resuming(runner: Runner) -> Path:
    """Write a checkpoint in `after_train_iter`, from which ``--resume`` goes on."""
    folder = Path(runner.work_dir)
    name = f'iter_{runner.iter + 1}.pth'
    runner.save_checkpoint(str(folder), name, by_epoch=False, backend_args=WHOLE)
    if is_main_process():
        last = str(folder / name)
        atomic_write(folder / 'last_checkpoint', lambda tmp: tmp.write_text(last))
    return folder / name
