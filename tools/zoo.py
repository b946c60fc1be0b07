"""Prune every config of the installed libraries at random and prove the result.

Each config is built without pretrained weights, its loss is run on a made-up batch on
the CPU, 30 % of the units go at random, and the masked model is compared with the
compact one. One JSON line is appended for each; lines that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmgfp.cli import run_cli
from mmgfp.io import atomic_write
from mmgfp.zoo import LIBRARIES, examine, list_configs, one_per_family, preload, render

FORK = multiprocessing.get_context('fork')  # the libraries are imported only once


def parse_args() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--library', choices=LIBRARIES, action='append')
    parser.add_argument(
        '--families', action='store_true', help='one config of each family folder'
    )
    parser.add_argument('--filter', default='*', metavar='PATTERN')
    parser.add_argument('--limit', type=int, help='at most so many new configs')
    parser.add_argument('--json', default='work_dirs/zoo.jsonl', metavar='FILE')
    parser.add_argument('--page', metavar='FILE', help='write a Markdown page, too')
    parser.add_argument('--timeout', type=float, default=300, help='seconds a config')
    parser.add_argument('-j', '--jobs', type=int, default=1)
    return parser.parse_args()


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished configs; of several lines of one config the last counts."""
    lines = path.read_text().splitlines() if path.is_file() else []
    results = [json.loads(line) for line in lines]
    return {r['config']: r for r in results}


def run_all(configs: list[str], path: Path, timeout: float, jobs: int) -> None:
    """Examine ``configs``, each in a process of its own, and append to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting, running = list(reversed(configs)), dict[str, _Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            config = waiting.pop()
            running[config] = _Job(config, timeout)
        for config, job in list(running.items()):
            result = job.poll()
            if result is None:
                continue
            del running[config]
            with path.open('a') as file:
                file.write(json.dumps(result) + '\n')
            print(
                f'{len(waiting)} left',
                result['status'],
                config,
                result['reason'],
                flush=True,
            )
        time.sleep(0.2)


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
            'status': 'not run' if self.stage not in ('tracing', 'proof') else 'failed',
            'reason': f'{self.stage}: {reason}',
            'seconds': round(time.monotonic() - self.start, 1),
        }


def _work(config: str, sender: Connection) -> None:
    sender.send(examine(config, sender.send))


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    configs: list[str] = []
    for library in args.library or LIBRARIES:
        found = [c for c in list_configs(library) if fnmatchcase(c, args.filter)]
        configs += one_per_family(found) if args.families else found
    path = Path(args.json)
    done = read_results(path)
    missing = [c for c in configs if c not in done]
    preload()
    run_all(missing[: args.limit], path, args.timeout, args.jobs)
    if args.page:
        results = read_results(path)
        text = render([results[c] for c in configs if c in results])
        atomic_write(args.page, lambda tmp: tmp.write_text(text))


if __name__ == '__main__':
    run_cli(main)
