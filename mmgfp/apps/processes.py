"""The processes of tools that run one after the other, or side by side."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmgfp.utils.errors import MMGFPError
from mmgfp.utils.io import check_folder


class StageError(MMGFPError):
    """A tool that the pipeline started has failed, or left no checkpoint."""


class Processes:
    """The tools that are at work, so that they can be ended together.

    Args:
        threads: Threads of each; by default, what the libraries choose.
        lock: An open file that they hold on to, if any: a lock on it lasts until the
            last of them has ended, even where whoever started them was killed.
    """

    def __init__(self, threads: int | None = None, lock: int | None = None) -> None:
        names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS') if threads else ()
        self._environment = {**os.environ, **dict.fromkeys(names, str(threads))}
        self._inherited = () if lock is None else (lock,)
        self._running: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    @contextmanager
    def start(self, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        """Start a program whose output is read by the caller, and wait for its end.

        Raises:
            StageError: If all were told to stop.
        """
        with self._guard:
            if self._stopped:
                raise StageError('the run was stopped; the same command continues it')
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=self._environment,
                pass_fds=self._inherited,
            )
            self._running.add(process)
        try:
            with process:
                try:
                    yield process
                except BaseException:
                    process.terminate()  # its end is waited for
                    raise
        finally:
            with self._guard:
                self._running.discard(process)

    def stop(self) -> None:
        """Ask all programs to end, and start no others."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.terminate()


@contextmanager
def working_alone(work_dir: Path, threads: int | None = None) -> Iterator[Processes]:
    """Lock a folder against a second command, and end all tools with this process.

    Where the process was killed, tools that it had started go on for a while: they
    hold on to the lock, and the next command waits for them.

    Args:
        work_dir: The folder.
        threads: Threads of each tool.
    """
    check_folder(work_dir)
    with (work_dir / '.lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f'waiting for tools that are still at work in {work_dir}; '
                'the newest log below it shows how far they are',
                flush=True,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        processes = Processes(threads, lock.fileno())
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            yield processes
        finally:
            # None is a handler that was not set by Python, which cannot set it again.
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _leave(number: int, frame: Any) -> None:
    name = signal.Signals(number).name
    print(f'asked to end ({name}); the same command goes on', flush=True)
    sys.exit(128 + number)
