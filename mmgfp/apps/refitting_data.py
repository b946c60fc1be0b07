"""Batches of a config's training images, to score units by and to refit layers on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from mmgfp.apps.cli import reading_config
from mmgfp.engine.config_search import dicts_in, scope_of, testing_pipeline
from mmgfp.export.calibration import innermost_dataset
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import random_states_restored, seed_all

#: Batches that refitting needs, as some are held out.
LEAST_BATCHES = 2


def refitting_batches(
    cfg: Config,
    images: int,
    batch_size: int | None = None,
    seed: int = 0,
    annotated: bool = True,
    least: int = LEAST_BATCHES,
) -> list[Any]:
    """Return batches of training images, without augmentation.

    Images are read and annotated as in training, and are resized, cropped and padded as
    in testing; a config without a pipeline of testing has them as in training.

    Args:
        cfg: A config with a train dataloader.
        images: Number of images at most, drawn without replacement.
        batch_size: Images of a batch; that of the train dataloader by default.
        seed: Number from which the draw and augmentations start.
        annotated: Whether annotations are read; without, all images of the dataset may
            be drawn, those on which nothing is annotated, too.
        least: Batches that are needed.

    Returns:
        The batches, before the data preprocessor. All are of the same size.

    Raises:
        ConfigError: If the config has no training data, or too few for so many
            batches, or no pipeline of testing for images without annotations.
    """
    loader = cfg.get('train_dataloader')
    if not loader:
        expected = 'in the config, whose images layers are refitted on'
        raise ConfigError('train_dataloader', expected, 'none', 'add it to the config')
    init_default_scope(scope_of(cfg) or 'mmengine')
    chosen_set = _dataset(cfg) if annotated else _images(cfg)
    with reading_config(cfg):
        dataset: Any = DATASETS.build(chosen_set)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(dataset))[:images].tolist()
    size = min(batch_size or loader.get('batch_size') or 1, len(chosen))
    starts = range(0, len(chosen) - size + 1, size or 1)
    _check_enough(len(starts), size, len(chosen), least)
    collate = pseudo_collate if scope_of(cfg) == 'mmdet' else default_collate
    with reading_config(cfg), random_states_restored(nn.Identity()):
        seed_all(seed)  # a run that goes on needs the same images, augmented or not
        return [collate([dataset[i] for i in chosen[s : s + size]]) for s in starts]


def _check_enough(batches: int, size: int, images: int, least: int) -> None:
    """Refuse fewer batches than needed."""
    if batches < least:
        why = ', as some are held out' if least > 1 else ''
        raise ConfigError(
            '--images',
            f'at least {least} batches of {size}{why}',
            f'{images} images',
            'raise it, or lower --batch-size',
        )


def _dataset(cfg: Config) -> Mapping[str, Any]:
    """Return a config of the training set without augmentation."""
    dataset = _prepared_as_in_testing(cfg)
    return dataset or copy.deepcopy(cfg.train_dataloader.dataset)


def _images(cfg: Config) -> Mapping[str, Any]:
    """Return a config of the images of the training set, without annotations.

    Raises:
        ConfigError: If the config has no pipeline of testing: that of training may ask
            for annotations; or none of training, which says how images are read.
    """
    dataset = _prepared_as_in_testing(cfg)
    if dataset is None:
        raise ConfigError(
            '--label-free',
            'for a config with pipelines of training and of testing, by which images '
            'are read and prepared',
            'none in val_dataloader and test_dataloader'
            if innermost_dataset(cfg.train_dataloader)
            else 'none in the dataset of train_dataloader',
            'add one; --max-images 0 does without tests',
        )
    steps = dataset['pipeline']
    dataset['pipeline'] = [s for s in steps if not _is_of(s, 'Annotations')]
    # Datasets for detection drop images without boxes, but not in testing.
    dataset.pop('filter_cfg', None)
    if scope_of(cfg) == 'mmdet':
        dataset['test_mode'] = True
    return dataset


def _prepared_as_in_testing(cfg: Config) -> dict[str, Any] | None:
    """Return the dataset that reads the training images, with steps of testing."""
    testing = testing_pipeline(cfg)
    dataset = copy.deepcopy(innermost_dataset(cfg.train_dataloader))
    if dataset is None or not testing:
        return None
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
