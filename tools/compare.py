"""Prune one model in many ways under one budget, and compare: a table and curves.

The comparison is a config that lists variants, targets and seeds (docs/compare.md).
Every stage runs in a process of its own, and nothing that has finished is run again, so
the same command continues after an interruption. A run that fails does not stop the
others: its reason stands below the table, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmgfp.apps.cli import run_cli, whole_number
from mmgfp.apps.compare.report import compare
from mmgfp.apps.compare.settings import read_comparison

TOOLS = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('comparison', help='config that lists variants and targets')
    parser.add_argument('--work-dir', type=Path, help='where everything goes')
    parser.add_argument(
        '-j',
        '--jobs',
        type=whole_number(1),
        default=1,
        metavar='N',
        help='how many run at a time, with one thread each if there are several',
    )
    parser.add_argument(
        '--checkpoint',
        help='weights of the original model, in place of those of the comparison',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='config entries to override in every stage, as key.sub=value; '
        'data_root=DIR moves every dataset',
    )
    parser.add_argument(
        '--list', action='store_true', help='print the runs and do nothing'
    )
    args = parser.parse_args(argv)
    if args.work_dir is None and not args.list:
        parser.error('--work-dir is needed for all but --list')
    return args


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    given = {} if args.checkpoint is None else {'checkpoint': args.checkpoint}
    comparison = read_comparison(args.comparison, args.cfg_options, **given)
    if args.list:
        print(*(run.name for run in comparison.runs), sep='\n')
        return
    _, failures = compare(comparison, TOOLS, args.work_dir, args.jobs)
    print(f'in {args.work_dir}: results.md, results.json, curves.svg')
    sys.exit(bool(failures))


if __name__ == '__main__':
    run_cli(main)
