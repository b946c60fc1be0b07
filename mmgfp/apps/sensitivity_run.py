"""A config and a checkpoint made ready for a scan of sensitivity."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner

from mmgfp.apps.cli import reading_config
from mmgfp.apps.evaluation import runner_to_test
from mmgfp.apps.run_config import check_entries, prepare_config, seed_of
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.config_search import scope_of
from mmgfp.engine.registry import PRUNING_HOOKS, is_named
from mmgfp.report.quantities import main_metric
from mmgfp.surgery.fit import check_shapes
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import load_weights_only

#: Batches of training that are looked through for one with boxes.
TRIES = 20


def without_ratios(cfg: Config) -> None:
    """Drop the ratios of the pruning hook, which a scan is about to make, in place."""
    for hook in cfg.get('custom_hooks') or []:
        if is_named(hook.get('type'), *PRUNING_HOOKS):
            for name in ('scope', 'ratios'):
                hook.pop(name, None)


def validation_split(cfg: Config) -> str:
    """Return the split that `validation_config` tests on, ``'val'`` or ``'test'``."""
    return 'val' if cfg.get('val_dataloader') else 'test'


def validation_config(cfg: Config, max_images: int | None, work_dir: Path) -> Config:
    """Return a config that tests on the validation set, if the config has one.

    Args:
        cfg: The config; it is left as it is.
        max_images: Images to test on, evenly spaced; all if None.
        work_dir: Where logs go.

    Raises:
        ConfigError: If it has no data to test on, or they cannot be limited.
    """
    cfg = copy.deepcopy(cfg)
    if validation_split(cfg) == 'val':
        cfg.test_dataloader = cfg.val_dataloader
        cfg.test_evaluator = cfg.val_evaluator
        cfg.test_cfg = dict()
    else:
        print('the config has no val_dataloader: measured on test_dataloader instead')
    prepare_config(cfg, ['train', 'test'])
    check_entries(cfg, 'test')
    for stage in ('train', 'val'):
        cfg[f'{stage}_cfg'] = cfg[f'{stage}_dataloader'] = None
    cfg.update(optim_wrapper=None, param_scheduler=None, val_evaluator=None)
    cfg.update(custom_hooks=[], load_from=None, resume=False, log_level='ERROR')
    cfg.work_dir = str(work_dir)
    if max_images is not None:
        init_default_scope(scope_of(cfg) or 'mmengine')
        with reading_config(cfg):
            count = len(DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset)))
        if count > max_images:
            # Not the first ones, which may all be of one class.
            indices = np.linspace(0, count - 1, max_images).astype(int).tolist()
            cfg.test_dataloader.dataset.indices = indices
    return cfg


class Validation:
    """Measures a metric of a model on the validation set, as often as is asked for.

    Args:
        cfg: What `validation_config` returns.
        checkpoint: The weights.
        metric: The metric, see `main_metric`.

    Attributes:
        model: The model.

    Raises:
        ConfigError: If something cannot be built.
        StructureError: If weights have other shapes than the model.
    """

    def __init__(self, cfg: Config, checkpoint: str, metric: str | None) -> None:
        self._metric = metric
        self._runner = runner_to_test(cfg)
        self.model: Any = self._runner.model
        if '://' not in checkpoint:
            weights = load_weights_only(checkpoint)
            shapes = {n: t.shape for n, t in self.model.state_dict().items()}
            remedy = 'give a checkpoint of this config'
            state = weights.get('state_dict', weights)
            check_shapes(state, shapes, 'as in the model of the config', remedy)
        self._runner.load_checkpoint(checkpoint)
        self._limit_images()

    def _limit_images(self) -> None:
        """Let COCO's metric count the images that are tested, not all of its file."""
        dataset = self._runner.test_loop.dataloader.dataset
        if getattr(dataset, '_indices', None) is None:
            return
        for metric in self._runner.test_loop.evaluator.metrics:
            if hasattr(metric, 'img_ids'):
                infos = map(dataset.get_data_info, range(len(dataset)))
                metric.img_ids = [info['img_id'] for info in infos]

    def __call__(self, model: Any = None) -> tuple[str, float]:
        """Return the metric's name for people and its value.

        Args:
            model: A model of the same class instead of the one of the checkpoint.
        """
        self._runner.model = self.model if model is None else model
        return main_metric(self._runner.test(), self._metric)


def training_batches(cfg: Config, model: Any, count: int) -> Iterator[BatchCalls]:
    """Yield the first batches of a config's train dataloader, those with boxes.

    Raises:
        ConfigError: If the loader cannot be built, or there are too few.
    """
    seed = seed_of(cfg)
    with reading_config(cfg):
        loader = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader), seed=seed)
    given = 0
    # The same batches again, where one epoch has too few.
    epochs: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    for data in itertools.islice(epochs, count + TRIES):
        calls = BatchCalls(model, data)
        if not calls.without_boxes:
            yield calls
            given += 1
        if given == count:
            return
    got = f'{given} of {count} batches with boxes'
    raise ConfigError('train_dataloader', 'with annotations', got, 'look at the data')


def report_lines(
    names: Sequence[str],
    units: Sequence[int],
    losses: Sequence[Sequence[float | None]],
    shares: Sequence[float],
    ratios: Sequence[float],
) -> list[list[str]]:
    """Return the cells of the table: losses of each group, and its ratio."""
    cells = [['group', 'units', *(f'{share:.0%}' for share in shares), 'ratio']]
    for name, count, row, ratio in zip(names, units, losses, ratios, strict=True):
        texts = ('' if loss is None else f'{loss:.2f}' for loss in row)
        cells.append([name, str(count), *texts, f'{ratio:.3g}'])
    return cells
