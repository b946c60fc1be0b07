"""What the command-line tools share: configs by name, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hub import get_config

from mmgfp.apps.run_config import spread_variables
from mmgfp.utils.errors import ConfigError, MMGFPError
from mmgfp.utils.io import load_weights_only


def run_cli(main: Callable[[], None]) -> None:
    """Run ``main``; print what it raises on purpose as one line and exit with 2."""
    try:
        main()
    except (MMGFPError, FileNotFoundError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)


def check_checkpoint(field: str, path: str) -> None:
    """Check that a local checkpoint is there and whole; a remote one is taken as is.

    Raises:
        ConfigError: There is no such file.
        StructureError: It is damaged.
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
        ConfigError: There is no such config, or it cannot be read.
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
