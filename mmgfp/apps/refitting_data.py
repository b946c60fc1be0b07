"""Batches of a config's training images, to score units by and to refit layers on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from mmgfp.apps.cli import reading_config
from mmgfp.engine.config_search import dicts_in, scope_of, testing_pipeline
from mmgfp.export.calibration import innermost_dataset
from mmgfp.utils.errors import ConfigError

#: Batches that refitting needs, as some are held out.
LEAST_BATCHES = 2


def refitting_batches(
    cfg: Config, images: int, batch_size: int | None = None, seed: int = 0
) -> list[Any]:
    """Return batches of training images with annotations, without augmentation.

    Images are read and annotated as in training, and are resized, cropped and padded as
    in testing; a config without a pipeline of testing has them as in training.

    Args:
        cfg: A config with a train dataloader.
        images: Number of images at most, drawn without replacement.
        batch_size: Images of a batch; that of the train dataloader by default.
        seed: Number from which the draw starts.

    Returns:
        The batches, before the data preprocessor. All are of the same size.

    Raises:
        ConfigError: If the config has no training data, or too few for two batches.
    """
    loader = cfg.get('train_dataloader')
    if not loader:
        raise ConfigError(
            'train_dataloader',
            'in the config, whose images and annotations layers are refitted on',
            'none',
            'add it to the config',
        )
    init_default_scope(scope_of(cfg) or 'mmengine')
    with reading_config(cfg):
        dataset: Any = DATASETS.build(_dataset(cfg))
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(dataset))[:images].tolist()
    size = min(batch_size or loader.get('batch_size') or 1, len(chosen))
    starts = range(0, len(chosen) - size + 1, size or 1)
    if len(starts) < LEAST_BATCHES:
        raise ConfigError(
            '--images',
            f'at least {LEAST_BATCHES} batches of {size}, as some are held out',
            f'{len(chosen)} images',
            'raise it, or lower --batch-size',
        )
    collate = pseudo_collate if scope_of(cfg) == 'mmdet' else default_collate
    with reading_config(cfg):
        return [collate([dataset[i] for i in chosen[s : s + size]]) for s in starts]


def _dataset(cfg: Config) -> Mapping[str, Any]:
    """Return a config of the training set without augmentation."""
    testing = testing_pipeline(cfg)
    dataset = copy.deepcopy(innermost_dataset(cfg.train_dataloader))
    if dataset is None or not testing:
        return copy.deepcopy(cfg.train_dataloader.dataset)
    # What packs may stand in a dataset around this one, after mosaics, say.
    steps = [
        step
        for node in dicts_in(cfg.train_dataloader)
        for step in node.get('pipeline') or ()
    ]
    packs = [s for s in steps if _is_of(s, 'Pack')][:1]
    # Annotations come before what moves them; those of testing are not moved.
    loads = [s for s in dataset['pipeline'] if _is_of(s, 'Load')]
    geometry = [s for s in testing if not _is_of(s, 'Load') and not _is_of(s, 'Pack')]
    dataset['pipeline'] = [*loads, *geometry, *packs]
    return dataset


def _is_of(step: Mapping[str, Any], kind: str) -> bool:
    return kind in str(step.get('type'))
