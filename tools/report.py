"""Write one HTML file about a run, or about several side by side.

A run is the folder that tools/train.py left with a pruning hook, or one that
tools/prune.py or tools/deploy_pruned.py wrote. The page needs no
other file and asks for none (docs/report.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgfp.apps.cli import (
    Overrides,
    check_checkpoint,
    load_config,
    run_cli,
    whole_number,
)
from mmgfp.apps.detections import IMAGES, draw_checkpoints
from mmgfp.report.page import write_report
from mmgfp.report.run import read_runs
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
    parser.add_argument(
        '--config', help='config of the unpruned model, to show what it detects'
    )
    parser.add_argument(
        '--checkpoints',
        nargs='+',
        metavar='FILE',
        help='the original, pruned and deployed weights whose detections are shown',
    )
    parser.add_argument(
        '--images',
        type=whole_number(1),
        default=IMAGES,
        help='validation images to show',
    )
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args()


def check_out(path: Path) -> None:
    """Check that a page can be written to a path, before anything is read.

    Raises:
        ConfigError: If it is a folder, or in one that is not there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        got = f'the folder {path}' if path.is_dir() else f'{path}, in no such folder'
        raise ConfigError('--out', 'a file to write', got, 'name another one')


def check_models(args: argparse.Namespace) -> None:
    """Check what is to be drawn, before anything is read.

    Raises:
        ConfigError: If the config or the checkpoints are missing.
        StructureError: If a checkpoint is damaged.
    """
    if (args.config is None) != (args.checkpoints is None):
        got = f'{"--config" if args.config else "--checkpoints"} alone'
        both = '--config and --checkpoints'
        raise ConfigError(both, 'given together', got, 'add the other')
    for path in args.checkpoints or ():
        check_checkpoint('--checkpoints', path)


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    check_out(args.out)
    check_models(args)
    cfg = load_config(args.config, args.cfg_options) if args.config else None
    runs, gallery = read_runs(args.work_dirs), None
    if cfg is not None:
        gallery = draw_checkpoints(cfg, args.checkpoints, args.images)
    write_report(runs, args.out, gallery)
    print(f'wrote {args.out} ({args.out.stat().st_size / 1e3:.0f} kB)')


if __name__ == '__main__':
    run_cli(main)
