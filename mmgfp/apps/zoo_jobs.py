"""Examination of many configs, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmgfp.apps.json_lines import append_line, read_lines
from mmgfp.apps.zoo import examine, next_of

# Forked processes inherit the libraries, which take seconds to import.
FORK = multiprocessing.get_context('fork')


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read the results of finished configs; the last line of a config counts."""
    return {result['config']: result for result in read_lines(path)}


def run_all(
    families: Sequence[Sequence[str]],
    results: dict[str, dict[str, Any]],
    path: Path,
    timeout: float,
    jobs: int,
) -> None:
    """Examine configs of each family until the loss of one runs.

    Args:
        families: Configs of each family, the best first.
        results: Results so far, by config; new ones are added.
        path: The file that new results are appended to, one JSON line each.
        timeout: Seconds after which the process of a config is killed.
        jobs: Number of processes at a time.
    """
    waiting = deque(families)
    running: list[tuple[Sequence[str], _Job]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            names = waiting.popleft()
            config = next_of(names, results)
            if config is not None:
                running.append((names, _Job(config, timeout)))
        for names, job in list(running):
            result = job.poll()
            if result is None:
                continue
            running.remove((names, job))
            results[job.config] = result
            append_line(path, result)
            outcome = f'{len(waiting)} remaining: {job.config} {result["status"]}'
            print(outcome, result['reason'], flush=True)
            # If the loss did not run, the family's next config gets its turn at once.
            waiting.appendleft(names)
        time.sleep(0.1)


class _Job:
    """Examination of one config in a process of its own."""

    def __init__(self, config: str, timeout: float) -> None:
        self.config = config
        self.timeout = timeout
        self.start = time.monotonic()
        self.stage = 'start'
        self.receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_work, args=(config, sender), daemon=True)
        self.process.start()
        sender.close()

    def poll(self) -> dict[str, Any] | None:
        """Return the result once there is one; a hung or dead process is a result."""
        try:
            while self.receiver.poll():
                message = self.receiver.recv()
                if isinstance(message, dict):
                    self.process.join()
                    return message
                self.stage = message
        except EOFError:
            self.process.join()
            return self._lost(f'process ended with {self.process.exitcode}')
        if time.monotonic() - self.start < self.timeout:
            return None
        self.process.kill()
        self.process.join()
        return self._lost(f'no end after {self.timeout:g} s')

    def _lost(self, reason: str) -> dict[str, Any]:
        return {
            'config': self.config,
            'status': 'failed' if self.stage == 'tracing' else 'not run',
            'reason': f'{self.stage}: {reason}',
            'seconds': round(time.monotonic() - self.start, 1),
        }


def _work(config: str, sender: Connection) -> None:
    sender.send(examine(config, sender.send))
