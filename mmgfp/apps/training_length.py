"""How long a config trains, and how its schedule looks when it trains shorter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmgfp.apps.cli import reading_config
from mmgfp.apps.config_text import Entry
from mmgfp.apps.run_config import check_entries, prepare_config, seed_of
from mmgfp.engine.config_search import scope_of
from mmgfp.utils.words import counted

#: Entries of schedulers that count epochs or iterations of training.
COUNTS = ('begin', 'end', 'T_max', 'milestones', 'step_size', 'total_steps')


@dataclass(frozen=True)
class Length:
    """How long a config trains.

    Attributes:
        by_epoch: Whether the config counts epochs.
        epoch: Iterations of one pass over the training data.
        iterations: Iterations of the whole training.
    """

    by_epoch: bool
    epoch: int
    iterations: int

    def iterations_for(self, epochs: int | None) -> int:
        """Return the iterations of so many epochs; of the whole training for None."""
        return self.iterations if epochs is None else epochs * self.epoch


def length_of(cfg: Config) -> Length:
    """Return how long a config trains; its training data is opened to be counted.

    Raises:
        ConfigError: If it cannot train, or its data is missing.
    """
    prepare_config(cfg, ('train', 'val'))
    check_entries(cfg, 'train')
    init_default_scope(scope_of(cfg) or 'mmengine')
    with reading_config(cfg):
        loader = copy.deepcopy(cfg.train_dataloader)
        epoch = len(Runner.build_dataloader(loader, seed=seed_of(cfg)))
        train = cfg.train_cfg
        by_epoch = 'max_epochs' in train
        total = train['max_epochs'] * epoch if by_epoch else train['max_iters']
    return Length(by_epoch, epoch, total)


def shortened_schedule(cfg: Config, length: Length, epochs: int) -> list[Entry]:
    """Return the entries of a config that trains another number of epochs.

    Its learning rate takes the same course in that time.

    Args:
        cfg: The config.
        length: How long it trains.
        epochs: How long it shall train.
    """
    count = epochs if length.by_epoch else length.iterations_for(epochs)
    name = 'max_epochs' if length.by_epoch else 'max_iters'
    loop: dict[str, Any] = {name: count}
    for key in ('val_interval', 'val_begin'):
        if cfg.train_cfg.get(key, 1) > count:
            loop[key] = count
    comment = (
        f'{counted(epochs, "epoch")}; the learning rate takes its course in that time.'
    )
    entries = [Entry('train_cfg', loop, comment)]
    factor = length.iterations_for(epochs) / length.iterations
    if schedulers := cfg.get('param_scheduler'):
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        scaled = [scaled_scheduler(s, factor) for s in schedulers]
        kept = [s for s in scaled if s.get('end') is None or s['end'] > s['begin']]
        entries.append(Entry('param_scheduler', kept))
    return entries


def scaled_scheduler(scheduler: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a scheduler with all that counts epochs or iterations scaled.

    Examples:
        >>> scaled_scheduler(dict(type='MultiStepLR', milestones=[8, 11], end=12), 0.5)
        {'type': 'MultiStepLR', 'milestones': [4, 6], 'end': 6, 'begin': 0}
    """

    def scale(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [scale(v) for v in value]
        return int(value * factor + 0.5)

    result = {
        key: scale(value) if key in COUNTS and value is not None else value
        for key, value in scheduler.items()
    }
    for key in ('T_max', 'step_size', 'total_steps'):
        if result.get(key) is not None:
            result[key] = max(result[key], 1)
    return {**result, 'begin': result.get('begin', 0)}
