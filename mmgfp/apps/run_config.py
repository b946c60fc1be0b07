"""What a config needs between the command line and a runner."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmengine.config import Config

from mmgfp.utils.errors import ConfigError

# Variables of a config file that its other entries repeat.
VARIABLES = ('data_root', 'pretrained', 'pruned')


def prepare_config(cfg: Config, splits: Iterable[str]) -> None:
    """Completes dataloaders and looks for the data.

    Args:
        cfg: The config; changed in place.
        splits: Which of `train`, `val` and `test` will be used.

    Raises:
        ConfigError: If a dataset is missing on disk.
    """
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_dataloaders(cfg)
    check_data(cfg, splits)


def spread_variables(cfg: Config, options: Mapping[str, Any] | None) -> None:
    """Writes overridden variables to wherever the config file used them, in place.

    A config file copies its variables when it is read, so that overriding
    `data_root` alone would move no dataset. A variable that ends in a slash is
    replaced where it starts a path, any other where it stands alone.

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
    """Gives MMPreTrain's dataloaders the collate function its own tools give."""
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None:
            loader.setdefault('collate_fn', dict(type='default_collate'))


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Checks that the local data which the dataloaders name is there.

    Args:
        cfg: A config with `<split>_dataloader` entries.
        splits: Of `train`, `val` and `test`. Passed over are splits that the
            config lacks, and datasets that name no annotation file or make
            their own data.

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
    """Yields the dataset dicts with an annotation file, those in wrappers too."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, Mapping):
        if node.get('ann_file') and node.get('type') != 'DigitsDetection':
            yield node
        yield from _datasets(node.get('dataset'))
        yield from _datasets(node.get('datasets'))
