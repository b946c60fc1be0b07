"""Prune every config of the installed libraries at random and verify the result.

Each model is built without pretrained weights, its loss is run on a synthetic batch on
the CPU, 30 % of the units are pruned at random, and the masked model is compared with
the compact one. Each result is appended as one JSON line and not computed again.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

from mmgfp.apps.cli import run_cli
from mmgfp.apps.zoo import (
    LIBRARIES,
    STATUSES,
    by_family,
    known_of,
    list_configs,
    next_of,
    preload,
)
from mmgfp.apps.zoo_jobs import read_results, run_all
from mmgfp.apps.zoo_page import render
from mmgfp.utils.io import atomic_write


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--library', choices=LIBRARIES, action='append')
    parser.add_argument(
        '--families',
        action='store_true',
        help='only the first config of each family folder whose loss runs',
    )
    parser.add_argument('--filter', default='*', metavar='PATTERN')
    parser.add_argument(
        '--limit', type=int, help='the most families, or configs, to examine'
    )
    parser.add_argument('--json', default='work_dirs/zoo.jsonl', metavar='FILE')
    parser.add_argument('--page', metavar='FILE', help='write a Markdown page, too')
    parser.add_argument(
        '--retry',
        choices=STATUSES,
        action='append',
        default=[],
        help='examine configs with this outcome again',
    )
    parser.add_argument('--timeout', type=float, default=300, help='seconds a config')
    parser.add_argument('-j', '--jobs', type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    families: list[list[str]] = []
    for library in args.library or LIBRARIES:
        configs = [c for c in list_configs(library) if fnmatchcase(c, args.filter)]
        families += by_family(configs) if args.families else [[c] for c in configs]
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
