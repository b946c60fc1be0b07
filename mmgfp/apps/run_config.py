"""Completion of a config between the command line and its runner."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmgfp.config import PruningConfig
from mmgfp.engine.registry import PRUNING_HOOKS, is_named
from mmgfp.utils.errors import ConfigError

#: Entries that a runner needs, by what it shall do.
NEEDED = {
    'train': ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    'test': ('model', 'test_dataloader', 'test_cfg', 'test_evaluator'),
}
#: Variables of a config file that its other entries repeat.
VARIABLES = ('data_root', 'pretrained', 'pruned')
#: Options of a pruning hook that name or need a latency profile: with any value, or
#: with one.
NEED_PROFILE = {
    'latency_profile': None,
    'target': None,
    'normalize': 'latency',
    'divisor': 'auto',
}


def pruning_config(cfg: Config, profiled: bool = True) -> PruningConfig:
    """Return the options of the config's pruning hook; the defaults without one.

    Args:
        cfg: The config.
        profiled: Whether options that need a latency profile are of interest.

    Raises:
        ConfigError: If an option is not valid.

    Examples:
        >>> hook = dict(type='FisherPruningHook', keep=['neck'])
        >>> pruning_config(Config(dict(custom_hooks=[hook]))).keep
        ('neck',)
    """
    hook = dict(pruning_hook(cfg) or {})
    left_out = ['type', 'priority']
    if not profiled:
        left_out += [n for n, v in NEED_PROFILE.items() if v in (None, hook.get(n))]
    return PruningConfig.for_runner(
        **{k: v for k, v in hook.items() if k not in left_out}
    )


def pruning_hook(cfg: Config) -> Mapping[str, Any] | None:
    """Return the settings of the config's pruning hook, None without one."""
    hooks = cfg.get('custom_hooks') or []
    return next((h for h in hooks if is_named(h.get('type'), *PRUNING_HOOKS)), None)


def data_of(loader: Mapping[str, Any]) -> str:
    """Return what names the images of a dataloader's config, for people.

    Examples:
        >>> data_of(dict(dataset=dict(ann_file='annotations/test.json')))
        'annotations/test.json'
        >>> data_of(dict(dataset=dict(dataset=dict(data_prefix='test'))))
        'test'
    """
    dataset = loader.get('dataset') or {}
    while isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    names = (dataset.get(key) for key in ('ann_file', 'split', 'data_prefix'))
    found = next(filter(None, names), None)
    if isinstance(found, Mapping):
        found = ', '.join(map(str, found.values()))
    return str(found or dataset.get('type', 'its dataset'))


def configure_run(cfg: Config, args: argparse.Namespace) -> None:
    """Take the launcher and the work directory from the command line, in place.

    Args:
        cfg: The config; its own `work_dir` counts where the command line has none.
        args: The arguments of `mmgfp.apps.cli.add_runner_arguments`.
    """
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)


def build_runner(cfg: Config) -> Runner:
    """Build MMEngine's runner, or the one that the config names by `runner_type`."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def prepare_config(cfg: Config, splits: Iterable[str]) -> None:
    """Complete the dataloaders and check that their data exists.

    Args:
        cfg: The config; changed in place.
        splits: Which of `train`, `val` and `test` will be used.

    Raises:
        ConfigError: If a dataset is missing on disk.
    """
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_dataloaders(cfg)
    check_data(cfg, splits)


def check_entries(cfg: Config, stage: str) -> None:
    """Check that a config has all that a stage needs.

    Args:
        cfg: The config.
        stage: `train` or `test`.

    Raises:
        ConfigError: If an entry is missing.
    """
    missing = [name for name in NEEDED[stage] if cfg.get(name) is None]
    if missing:
        raise ConfigError(
            str(cfg.filename or 'config'),
            f'one with {", ".join(NEEDED[stage])}',
            f'none for {", ".join(missing)}',
            f'give the config of a run that can {stage}',
        )


def spread_variables(cfg: Config, options: Mapping[str, Any] | None) -> None:
    """Write overridden variables to wherever the config file used them, in place.

    A config file copies its variables when it is read, so overriding `data_root`
    alone would move no dataset. A variable that ends in a slash is replaced where it
    starts a path, any other where it is the whole value.

    Args:
        cfg: The config with `options` merged in.
        options: The command line's `--cfg-options`.
    """
    chosen = [name for name in VARIABLES if name in (options or {})]
    if not options or not chosen or not cfg.filename:
        return
    original = Config.fromfile(cfg.filename)
    for name in chosen:
        old, new = original.get(name), str(options[name])
        if isinstance(old, str):
            new = os.path.join(new, '') if old.endswith('/') else new
            cfg.merge_from_dict(_replaced(cfg.to_dict(), old, new))


def data_root_options(cfg: Config, folder: str) -> list[str]:
    """Return the overrides that let a config read its data from a folder.

    Raises:
        ConfigError: If there is no such folder, or the config does not say in one place
            where its data is.
    """
    if not Path(folder).is_dir():
        raise ConfigError('--data-root', 'a folder', folder, 'check the path')
    if isinstance(cfg.get('data_root'), str):
        slash = cfg.data_root.endswith('/')  # paths are put together without another
        return [f'data_root={os.path.join(folder, "") if slash else folder}']
    names = [f'{s}_dataloader' for s in ('train', 'val', 'test')]
    loaders = [name for name in names if cfg.get(name)]
    if not all((cfg[name].get('dataset') or {}).get('data_root') for name in loaders):
        raise ConfigError(
            '--data-root',
            'given with a config that has a variable data_root, or one in each dataset',
            str(cfg.filename),
            'name the entries by --cfg-options train_dataloader.dataset...=DIR',
        )
    return [f'{name}.dataset.data_root={folder}' for name in loaders]


def _replaced(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, old, new) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_replaced(value, old, new) for value in node)
    if isinstance(node, str) and (
        node == old or (old.endswith('/') and node.startswith(old))
    ):
        return new + node[len(old) :]
    return node


def _complete_dataloaders(cfg: Config) -> None:
    """Set the collate function that MMPreTrain's own tools set."""
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None:
            loader.setdefault('collate_fn', dict(type='default_collate'))


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Check that the local data which the dataloaders name exists.

    Args:
        cfg: A config with `<split>_dataloader` entries.
        splits: Which of `train`, `val` and `test` to check. Splits that the config
            lacks are skipped, and so are datasets that name no annotation file or
            draw their own data.

    Raises:
        ConfigError: If a dataset's annotation file is missing.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for dataset in _datasets(loader.get('dataset')):
            path = os.path.join(dataset.get('data_root') or '', dataset['ann_file'])
            if '://' not in path and not os.path.exists(path):
                raise ConfigError(
                    f'{split}_dataloader.dataset',
                    f'present at {path}',
                    'nothing',
                    'put or link it there, or pass --cfg-options data_root=DIR',
                )


def _datasets(node: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the dataset dicts with an annotation file, those in wrappers included."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, Mapping):
        # DigitsDetection draws its data on first use.
        if node.get('ann_file') and node.get('type') != 'DigitsDetection':
            yield node
        yield from _datasets(node.get('dataset'))
        yield from _datasets(node.get('datasets'))


def seed_of(cfg: Config) -> int:
    """Return the seed of a config, 0 without one."""
    return (cfg.get('randomness') or {}).get('seed') or 0
