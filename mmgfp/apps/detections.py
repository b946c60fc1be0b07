"""Detections of a model and of those pruned from it, on the same validation images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from mmgfp.apps.cli import reading_config
from mmgfp.apps.run_config import check_data
from mmgfp.engine.config_search import scope_of
from mmgfp.engine.deploy import read_trained
from mmgfp.report.gallery import Gallery, encode
from mmgfp.utils.errors import ConfigError

#: The score from which on detections are drawn, as MMDetection draws them.
THRESHOLD = 0.3
#: Validation images that are shown, unless told otherwise.
IMAGES = 3


def draw_checkpoints(cfg: Config, checkpoints: Sequence[str], count: int) -> Gallery:
    """Draw what the models of some checkpoints detect.

    Args:
        cfg: The config of the unpruned model.
        checkpoints: Weights of it, and of models that were pruned from it.
        count: Number of images, at most.

    Raises:
        ConfigError: If the config is of no detector, has no data to look at, or there
            are too many pictures for a page.
        StructureError: If a checkpoint does not fit.
    """
    labels = _labels([Path(path) for path in checkpoints])
    models = [read_trained(cfg, path).model for path in checkpoints]
    gallery = draw_detections(cfg, dict(zip(labels, models, strict=True)), count)
    if gallery is None:
        got = f'that of a {type(models[0]).__name__}'
        remedy = 'leave --config and --checkpoints out'
        raise ConfigError('--config', 'that of a detector', got, remedy)
    return gallery


def draw_detections(
    cfg: Config, models: Mapping[str, nn.Module], count: int = IMAGES
) -> Gallery | None:
    """Draw what models detect on validation images, evenly spaced.

    Args:
        cfg: The config of the unpruned model.
        models: Models in eval mode, by the names that are shown.
        count: Number of images, at most.

    Returns:
        The pictures; None for models of other tasks, which detect nothing.

    Raises:
        ConfigError: If the config has no data to look at, the images are in no files,
            or there are too many pictures for a page.
    """
    if not all(map(is_detector, models.values())):
        return None
    init_default_scope(scope_of(cfg) or 'mmengine')
    with reading_config(cfg):
        dataset = _validation_set(cfg)
    names, drawn = [], []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        data = dataset[int(index)]
        path = getattr(data['data_samples'], 'img_path', None)
        names.append(Path(path).name if path else f'image {index}')
        drawn.append([_draw(m, data, dataset.metainfo) for m in models.values()])
    pictures = encode(drawn)
    if pictures is None:
        got = f'{len(names)} for each of {len(models)} models'
        expected = 'so few that a page holds them'
        raise ConfigError('images to show', expected, got, 'ask for fewer')
    return Gallery(tuple(models), tuple(names), pictures, THRESHOLD)


def is_detector(model: nn.Module) -> bool:
    """Return whether a model is a detector of MMDetection, or inherits from one."""
    try:
        from mmdet.models.detectors.base import BaseDetector
    except ImportError:  # who has classifiers alone may do without it
        return False
    return isinstance(model, BaseDetector)


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return names of files, with their folders where names are the same."""
    stems = [path.stem for path in paths]
    return tuple(
        path.stem if stems.count(path.stem) == 1 else f'{path.parent.name}/{path.stem}'
        for path in paths
    )


def _validation_set(cfg: Config) -> Any:
    split = next((s for s in ('val', 'test') if cfg.get(f'{s}_dataloader')), None)
    if split is None:
        expected = 'one with val_dataloader or test_dataloader'
        raise ConfigError('--config', expected, 'neither', 'name another config')
    check_data(cfg, [split])
    return DATASETS.build(copy.deepcopy(cfg[f'{split}_dataloader'].dataset))


def _draw(model: nn.Module, data: dict[str, Any], meta: dict[str, Any]) -> np.ndarray:
    """Return the image with the detections of a model, (H, W, 3) in RGB.

    Raises:
        ConfigError: If the model gives no detections.
    """
    import mmcv  # only here, as classifiers do without both
    from mmdet.visualization import DetLocalVisualizer

    tested: Any = model
    with torch.no_grad():
        (found,) = tested.test_step(pseudo_collate([copy.deepcopy(data)]))
    if 'pred_instances' not in found or not getattr(found, 'img_path', None):
        got = f'a {type(model).__name__}, which gives a {type(found).__name__}'
        expected = 'of a detector that reads images from files'
        raise ConfigError('what is drawn', expected, got, 'do without pictures')
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = meta
    image = mmcv.imread(found.img_path, channel_order='rgb')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of boxes that reach over the border
        visualizer.add_datasample(
            'detections', image, found.cpu(), draw_gt=False, pred_score_thr=THRESHOLD
        )
    return visualizer.get_image()
