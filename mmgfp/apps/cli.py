"""Configs by name, shared arguments, and errors in one line for the tools."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.hub import get_config

from mmgfp.apps.run_config import spread_variables
from mmgfp.utils.errors import ConfigError, MMGFPError
from mmgfp.utils.io import atomic_write, load_weights_only


def run_cli(main: Callable[[], None]) -> None:
    """Run ``main``; print an error that is the user's as one line and exit with 2."""
    try:
        main()
    except (MMGFPError, FileNotFoundError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)


def add_shape_argument(parser: argparse.ArgumentParser, use: str) -> None:
    """Add ``--input-shape C H W`` to a parser, with the words of its help."""
    parser.add_argument(
        '--input-shape', nargs=3, type=int, metavar=('C', 'H', 'W'), help=use
    )


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that OpenMMLab's training and test tools share."""
    parser.add_argument(
        'config', help='a config file, or one of the zoo: mmdet::<path>'
    )
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='config entries to override, as key.sub=value; data_root=DIR moves '
        'every dataset',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def parse_runner_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and tell launchers' children their local rank."""
    args = parser.parse_args()
    # torchrun sets the variable itself, older launchers pass the flag instead.
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def check_checkpoint(field: str, path: str) -> None:
    """Check that a local checkpoint exists and is whole; accept any remote one.

    Raises:
        ConfigError: If there is no such file.
        StructureError: If it is damaged.
    """
    if '://' in path:
        return
    if not Path(path).is_file():
        raise ConfigError(
            field,
            'a checkpoint file',
            f'nothing at {path}',
            'check the path, or run the stage before this one',
        )
    load_weights_only(path)


def load_config(path: str, cfg_options: dict[str, Any] | None = None) -> Config:
    """Read a config file, or one of an installed library by ``mmdet::...``.

    Raises:
        ConfigError: If there is no such config, or it cannot be read.
    """
    remedy = 'give a path, or library::file such as mmdet::retinanet/<name>.py'
    try:
        if '::' in path:
            config = get_config(path)
        elif Path(path).is_file():
            config = Config.fromfile(path)
        else:
            raise FileNotFoundError('no such file')
    except (FileNotFoundError, ValueError, AssertionError, SyntaxError) as error:
        reason = f'{path} ({" ".join(str(error).split())})'
        raise ConfigError('config', 'a config file', reason, remedy) from None
    if cfg_options:
        config.merge_from_dict(cfg_options)
        spread_variables(config, cfg_options)
    return config


def write_json(path: str | Path, data: Any) -> None:
    """Write indented JSON, whole or not at all."""
    atomic_write(path, lambda tmp: tmp.write_text(json.dumps(data, indent=2) + '\n'))
