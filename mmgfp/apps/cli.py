"""Configs by name, shared arguments, and errors in one line for the tools."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.runner import Runner
from torch import Tensor, nn

from mmgfp.apps.run_config import spread_variables
from mmgfp.apps.upstream_noise import without_onedl_notice
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import ConfigError, MMGFPError, StructureError
from mmgfp.utils.io import atomic_write, load_weights_only

#: Entries that need not be in a config.
READ_BY_RUNNERS = {
    *inspect.signature(Runner).parameters,
    *('auto_scale_lr', 'custom_imports', 'find_unused_parameters', 'runner_type'),
    *('model_wrapper_cfg', 'sync_bn', 'compile', 'activation_checkpointing'),
}
#: What the line begins with in which a tool refuses what its user gave.
REFUSAL = 'error: '
#: The exit status then.
REFUSED = 2


def run_cli(main: Callable[[], None]) -> None:
    """Run ``main``; print an error that is the user's as one line and exit with 2."""
    try:
        with without_onedl_notice():
            main()
    except (MMGFPError, OSError) as error:
        print(f'{REFUSAL}{" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Overrides(DictAction):
    """Config entries to override, as MMEngine's tools take them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse ``KEY=VALUE`` arguments into a dict.

        Raises:
            ConfigError: If one of them has another form.
        """
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError) as error:
            got = f'{" ".join(values)}: {error}'
            remedy = 'write it so, in quotes where it has spaces: "data_root=my data/"'
            option = option_string or '--cfg-options'
            raise ConfigError(option, 'KEY=VALUE', got, remedy) from None

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """Return the path of a file or folder that is there as it is.

        MMEngine would take the spaces out of it, and split it at commas.
        """
        path = val.strip('\'"')
        is_path = os.sep in path and os.path.exists(path)
        return path if is_path else DictAction._parse_iterable(val)


class Targets(Overrides):
    """Targets of pruning, as ``COST=SHARE``: a dict, or a list of them if several."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse each argument into a dict of its own, so that none replaces another."""
        targets = []
        for value in values:
            parsed = argparse.Namespace()
            super().__call__(parser, parsed, [value], option_string)
            targets.append(getattr(parsed, self.dest))
        setattr(namespace, self.dest, targets if len(targets) > 1 else targets[0])


def whole_number(least: int) -> Callable[[str], int]:
    """Return a type of arguments: whole numbers of at least ``least``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            expected = f'a whole number of at least {least}'
            raise argparse.ArgumentTypeError(f'must be {expected} (got {text!r})')
        return number

    return parse


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
        action=Overrides,
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


def check_checkpoint(field: str, path: str, resume: bool = False) -> None:
    """Check that a local checkpoint exists and is whole; accept any remote one.

    Args:
        field: The argument that names it.
        path: The file.
        resume: Whether training goes on from it.

    Raises:
        ConfigError: If there is no such file, or training cannot go on from it.
        StructureError: If it is damaged or holds no weights.
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
    if Path(path).suffix in ('.json', '.py'):
        raise ConfigError(
            field,
            'a checkpoint with weights (.pth)',
            path,
            'name the .pth file; a structure is named by --cfg-options '
            'model.structure=FILE',
        )
    checkpoint = load_weights_only(path)
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict) or not any(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise StructureError(
            f'{field} {path}',
            "a checkpoint with weights in 'state_dict'",
            f'the keys {", ".join(map(str, checkpoint))}'[:200],
            'give a file that a training or tools/deploy_pruned.py wrote',
        )
    meta = checkpoint.get('meta')
    progress = meta.keys() if isinstance(meta, dict) else set()
    if resume and not ({'epoch', 'iter'} <= progress and 'message_hub' in checkpoint):
        raise ConfigError(
            f'{field} {path}',
            'a checkpoint of training',
            'one without its progress',
            'name it in load_from to start from its weights',
        )


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
    except Exception as error:  # any kind, as it may run any code
        reason = f'{path} ({one_line(error)})'
        raise ConfigError('config', 'a config file', reason, remedy) from None
    if cfg_options:
        override(config, cfg_options)
    return config


def override(config: Config, options: Mapping[str, Any]) -> None:
    """Override entries of a config, in place.

    Entries of a name that is new to it are added, with a warning if no runner reads it.

    Raises:
        ConfigError: If an option leads through something that has no entries.
    """
    names = dict.fromkeys(option.partition('.')[0] for option in options)
    unread = [n for n in names if n not in config and n not in READ_BY_RUNNERS]
    if unread:
        print(
            f'warning: --cfg-options adds {", ".join(unread)}, which {config.filename} '
            'does not have',
            file=sys.stderr,
        )
    try:
        config.merge_from_dict(dict(options))
        spread_variables(config, options)
        if not isinstance(config.get('custom_hooks') or [], list | tuple):
            raise TypeError('custom_hooks is a list')
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            '--cfg-options',
            f'entries of {config.filename}',
            f'{", ".join(options)}: {one_line(error)}',
            'check the names and the positions in lists',
        ) from None


@contextmanager
def reading_config(config: Config) -> Iterator[None]:
    """Say in one line that something cannot be built from a config.

    Raises:
        ConfigError: If the block raises any error.
    """
    try:
        yield
    except (MMGFPError, OSError):
        raise
    except Exception as error:  # libraries raise many kinds
        raise ConfigError(
            str(config.filename or 'config'),
            'a config of something that can be built',
            one_line(error),
            'correct the entry, or see what the libraries expect of it',
        ) from error


def build_from(config: Config) -> nn.Module:
    """Build a config's model, as `build_model` does.

    Raises:
        ConfigError: If it cannot be built.
    """
    with reading_config(config):
        return build_model(config)


def one_line(error: BaseException) -> str:
    """Return the kind and the words of an error that is not one of mmgfp."""
    words = ' '.join(str(error).split())
    return f'{type(error).__name__}: {words[:500]}'


def write_json(path: str | Path, data: Any) -> None:
    """Write indented JSON, whole or not at all."""
    atomic_write(path, lambda tmp: tmp.write_text(json.dumps(data, indent=2) + '\n'))
