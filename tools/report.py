"""Write one HTML file about a run, or about several side by side.

A run is the folder that tools/train.py left with a pruning hook, or one that
tools/prune.py, tools/deploy_pruned.py or tools/pipeline.py wrote. The page needs no
other file and asks for none (docs/report.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgfp.apps.cli import run_cli
from mmgfp.report.page import write_report
from mmgfp.utils.errors import ConfigError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'work_dirs', nargs='+', type=Path, metavar='WORK_DIR', help='folder of a run'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('report.html'), help='default: report.html'
    )
    return parser.parse_args()


def check_out(path: Path) -> None:
    """Check that a page can be written to a path, before anything is read.

    Raises:
        ConfigError: If it is a folder, or in one that is not there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        got = f'the folder {path}' if path.is_dir() else f'{path}, in no such folder'
        raise ConfigError('--out', 'a file to write', got, 'name another one')


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    check_out(args.out)
    path = write_report(args.work_dirs, args.out)
    print(f'wrote {path} ({path.stat().st_size / 1e3:.0f} kB)')


if __name__ == '__main__':
    run_cli(main)
