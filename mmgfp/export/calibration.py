"""Images of a config's own data, to calibrate quantised files with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from mmgfp.engine.config_search import dicts_in, scope_of
from mmgfp.export.fitting import fitted_pipeline, pad_to
from mmgfp.utils.errors import ConfigError

#: Whose images are taken: those of training, where there are any.
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


class CalibrationImages(Sequence[np.ndarray]):
    """Inputs of an exported file, made one at a time when they are read.

    They are images of training, evenly spread over the dataset, as the pipeline of
    testing and the model's data preprocessor give them.

    Args:
        cfg: The config.
        model: The model that was built from it.
        count: Number of images; all if the dataset has fewer.
        size: (H, W) of the file's input; None where a side may have any length.
        pad_value: What padding up to that size holds.

    Raises:
        ConfigError: If the config has no data, or they are missing or empty.
    """

    def __init__(
        self,
        cfg: Config,
        model: Any,
        count: int,
        size: Sequence[int | None],
        pad_value: float | Sequence[float] = 0.0,
    ) -> None:
        init_default_scope(scope_of(cfg) or 'mmengine')
        self.processor: Any = model.data_preprocessor
        self.collate = default_collate
        if scope_of(cfg) == 'mmdet':
            self.collate = pseudo_collate
        self.size, self.pad_value = size, pad_value
        chosen = _dataset(cfg, size)
        with _reading_data():
            self.dataset = DATASETS.build(chosen)
        total = len(self.dataset)
        if min(total, count) < 1:
            raise ConfigError(
                'the calibration set',
                'at least one image',
                f'{count} of the {total} of {cfg.filename or "the config"}',
                'raise --calib, or name a dataset that has images',
            )
        # Not the first ones: classification sets are sorted by class.
        self.indices = evenly(range(total), count)
        with _reading_data():
            self[0]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        data = self.collate([self.dataset[self.indices[index]]])
        images = self.processor(copy.copy(data), False)['inputs']
        padded = pad_to(images, self.size, self.pad_value)
        return padded.float().cpu().numpy()  # (1, C, H, W)


@contextmanager
def _reading_data() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            'the calibration set',
            'present where the config says',
            str(error),
            'put or link it there, pass --cfg-options data_root=DIR, or name images '
            'with --images',
        ) from error


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` items, evenly spread from the first to the last.

    Examples:
        >>> evenly(range(16), 5)
        [0, 4, 8, 11, 15]
    """
    steps = np.linspace(0, len(items) - 1, min(len(items), count))
    return [items[int(i)] for i in steps.round()]


def _dataset(cfg: Config, size: Sequence[int | None]) -> dict[str, Any]:
    """Return the config of a dataset with the pipeline of testing."""
    found = [innermost_dataset(cfg.get(name)) for name in LOADERS]
    datasets = [dataset for dataset in found if dataset is not None]
    testing = [innermost_dataset(cfg.get(name)) for name in LOADERS[:0:-1]]
    pipelines = [d['pipeline'] for d in testing if d is not None]
    if not datasets:
        raise ConfigError(
            'the calibration set', 'data of the config', 'none', 'name a dataset in it'
        )
    chosen = copy.deepcopy(dict(datasets[0]))
    # Images of training in the form of testing.
    pipeline = (pipelines or [chosen['pipeline']])[0]
    sides = [side for side in size if side is not None]
    chosen['pipeline'] = (
        fitted_pipeline(pipeline, sides) if len(sides) == 2 else pipeline
    )
    return chosen


def innermost_dataset(loader: Any) -> Any:
    """Return the first dataset of a loader that reads images itself."""
    nodes = list(dicts_in((loader or {}).get('dataset') or {}))
    return next(
        (
            n
            for n in nodes
            if 'pipeline' in n and not n.keys() & {'dataset', 'datasets'}
        ),
        None,
    )
