"""Prune every config of the installed libraries at random and verify the result.

Each config is built without pretrained weights, its loss is run on a made-up batch on
the CPU, 30 % of the units go at random, and the masked model is compared with the
compact one. One JSON line is appended for each; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Sequence
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmgfp.apps.cli import run_cli
from mmgfp.apps.zoo import (
    LIBRARIES,
    STATUSES,
    by_family,
    examine,
    known_of,
    list_configs,
    next_of,
    preload,
)
from mmgfp.apps.zoo_page import render
from mmgfp.utils.io import atomic_write

FORK = multiprocessing.get_context('fork')  # the libraries are imported only once


def parse_args() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--library', choices=LIBRARIES, action='append')
    parser.add_argument(
        '--families',
        action='store_true',
        help='of each family folder the first config whose loss runs',
    )
    parser.add_argument('--filter', default='*', metavar='PATTERN')
    parser.add_argument(
        '--limit', type=int, help='at most so many families, or configs'
    )
    parser.add_argument('--json', default='work_dirs/zoo.jsonl', metavar='FILE')
    parser.add_argument('--page', metavar='FILE', help='write a Markdown page, too')
    parser.add_argument(
        '--retry',
        choices=STATUSES,
        action='append',
        default=[],
        help='examine again what ended like this',
    )
    parser.add_argument('--timeout', type=float, default=300, help='seconds a config')
    parser.add_argument('-j', '--jobs', type=int, default=1)
    return parser.parse_args()


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished configs; of several lines of one config the last counts.

    A line that is cut short, as a killed run leaves it, is reported and left out.
    """
    results = {}
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            results[result['config']] = result
        except ValueError:
            print(f'{path}:{number} is cut short: its config is examined again')
    return results


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Append one line, on a line of its own even after one that is cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+b') as file:
        whole = file.tell() == 0 or path.read_bytes().endswith(b'\n')
        file.write(b'' if whole else b'\n')
        file.write(json.dumps(result).encode() + b'\n')


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
        results: What is known, by config; new results are added.
        path: They are appended here as well, one JSON line each.
        timeout: Seconds for each config, which has a process of its own.
        jobs: Processes at a time.
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
            append_result(path, result)
            said = f'{len(waiting)} left: {job.config} {result["status"]}'
            print(said, result['reason'], flush=True)
            waiting.appendleft(names)  # for the next config if the loss did not run
        time.sleep(0.1)


class _Job:
    """One config in a process of its own."""

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
        """The result, once there is one."""
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


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    families: list[list[str]] = []
    for library in args.library or LIBRARIES:
        found = [c for c in list_configs(library) if fnmatchcase(c, args.filter)]
        families += by_family(found) if args.families else [[c] for c in found]
    path = Path(args.json)
    results = read_results(path)
    results = {c: r for c, r in results.items() if r['status'] not in args.retry}
    unfinished = [names for names in families if next_of(names, results)]
    if unfinished:
        preload()
    run_all(unfinished[: args.limit], results, path, args.timeout, args.jobs)
    if args.page:
        results = read_results(path)
        text = render([r for names in families for r in known_of(names, results)])
        atomic_write(args.page, lambda tmp: tmp.write_text(text))


if __name__ == '__main__':
    run_cli(main)
