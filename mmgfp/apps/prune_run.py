"""Pruning a config's model without training: what `tools/prune.py` does."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn

from mmgfp.apps.analysis import costs_of
from mmgfp.apps.refitting_data import LEAST_BATCHES, refitting_batches
from mmgfp.apps.run_config import pruning_config, seed_of
from mmgfp.apps.sensitivity_run import Validation, validation_config
from mmgfp.apps.tables import size_cells
from mmgfp.compensation.in_training import NONE
from mmgfp.compensation.options import METHODS, CompensationConfig
from mmgfp.config import PruningConfig
from mmgfp.engine.artifact import circumstances, costs_in_numbers
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.deploy import Deployable, deploy, read_trained
from mmgfp.engine.recorded_losses import RecordedLoss, recorded_losses
from mmgfp.selection.targets import parse_targets
from mmgfp.utils.errors import ConfigError
from mmgfp.without_training import Pruned, prune_without_training

#: Choices of ``--compensate``.
COMPENSATIONS = (*METHODS, NONE)


@dataclass(frozen=True)
class Outcome:
    """A model that was pruned, and what it was before.

    Attributes:
        pruned: The result.
        options: The options of pruning.
        shape: Size (C, H, W) of the image that costs are counted for.
        rows: For the original and the pruned model, the name, costs, and the metric
            where there are images to test on.
        metric: The metric's name, None if nothing was tested.
        seconds: How long pruning took, without tests.
    """

    pruned: Pruned
    options: PruningConfig
    shape: Sequence[int]
    rows: list[dict[str, Any]]
    metric: str | None
    seconds: float


def pruning_options(cfg: Config, **given: Any) -> PruningConfig:
    """Return the options of pruning: those given, else of the config's hook, if any.

    Raises:
        ConfigError: If an option is not valid, or there are several targets.
    """
    given = {name: value for name, value in given.items() if value is not None}
    targets = parse_targets(given['target'])
    if len(targets) != 1:
        names = ', '.join(t.cost for t in targets)
        raise ConfigError('--target', 'one cost', names, 'keep one of them')
    return PruningConfig.of(pruning_config(cfg), **given)


def validation_of(
    cfg: Config, checkpoint: str, metric: str | None, images: int | None, logs: Path
) -> Validation | None:
    """Return what tests models on the config's validation set, None without any."""
    if not cfg.get('val_dataloader') and not cfg.get('test_dataloader'):
        print('the config has neither val_dataloader nor test_dataloader: not tested')
        return None
    return Validation(validation_config(cfg, images, logs), checkpoint, metric)


def prune(
    cfg: Config,
    checkpoint: str,
    options: PruningConfig,
    compensation: CompensationConfig | None,
    rounds: int | None,
    images: int,
    batch_size: int | None,
    validation: Validation | None,
) -> Outcome:
    """Prune a config's model without training, and test it before and after.

    Args:
        cfg: Its config.
        checkpoint: Its weights.
        options: What may go, and to which target.
        compensation: How layers are refitted; None leaves the model as cut.
        rounds: The number of cuts; by the target if None.
        images: Training images to use.
        batch_size: Images of a batch; that of the config if None.
        validation: Tests models; None does without.

    Raises:
        ConfigError: If the config's model is pruned already, or has no training data.
    """
    model = _unpruned(cfg, checkpoint)
    batches = _annotated(
        model, refitting_batches(cfg, images, batch_size, seed_of(cfg))
    )
    calls = BatchCalls(model, batches[0])
    shape = options.input_shape or calls.size or calls.data['inputs'][0].shape[1:]
    before = validation(model) if validation else None
    began = time.monotonic()
    with _shown() as steps:
        pruned = prune_without_training(
            model,
            [_Counted(loss, steps) for loss in recorded_losses(model, batches)],
            calls.forward,
            calls.images,
            options,
            compensation,
            rounds,
            profiles=calls.profile(model, shape),
            report=steps.begin,
        )
    seconds = time.monotonic() - began
    after = validation(pruned.model) if validation else None
    models = {'original': (model, before), 'pruned': (pruned.model, after)}
    rows = _rows(calls, shape, models)
    return Outcome(pruned, options, shape, rows, before and before[0], seconds)


def _rows(
    calls: BatchCalls,
    shape: Sequence[int],
    models: Mapping[str, tuple[nn.Module, tuple[str, float] | None]],
) -> list[dict[str, Any]]:
    """Return costs of models, and their metric where it was measured."""
    return [
        {'model': name, **costs_of(model, calls.profile(model, shape))}
        | ({'metric': result[1]} if result else {})
        for name, (model, result) in models.items()
    ]


def _unpruned(cfg: Config, checkpoint: str) -> Any:
    """Return a config's model with its weights; refuse one that is pruned."""
    trained = read_trained(cfg, checkpoint)
    if trained.structure is not None:
        raise ConfigError(
            'CONFIG and CHECKPOINT',
            'of a model that is not pruned',
            'a pruned one',
            'give those of the original, with a lower --target',
        )
    return trained.model


def _annotated(model: Any, batches: Sequence[Any]) -> list[Any]:
    """Return the batches on which something is annotated.

    Raises:
        ConfigError: If these are fewer than two.
    """
    chosen = [data for data in batches if not BatchCalls(model, data).without_boxes]
    if len(chosen) < LEAST_BATCHES:
        raise ConfigError(
            'train_dataloader',
            f'with at least {LEAST_BATCHES} batches of images that have boxes',
            f'{len(chosen)} of {len(batches)}',
            'raise --images, or look at the annotations',
        )
    return chosen


class _Steps:
    """A line on the error stream about the work at hand."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task('starting', total=None)

    def begin(self, line: str) -> None:
        self._progress.reset(self._task, description=line, total=None)

    def advance(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def _shown() -> Iterator[_Steps]:
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('batches'),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Steps(progress)


class _Counted:
    """A loss whose calls are shown."""

    def __init__(self, loss: RecordedLoss, steps: _Steps) -> None:
        self._loss, self._steps = loss, steps

    def __call__(self, model: nn.Module) -> Tensor:
        self._steps.advance()
        return self._loss(model)


def save(
    cfg: Config, outcome: Outcome, checkpoint: str, out: Path, name: str
) -> dict[str, Path]:
    """Write config, weights and structure of the pruned model.

    Args:
        cfg: The config of the unpruned model.
        outcome: The result.
        checkpoint: The original's weights.
        out: The folder.
        name: Name of the files.
    """
    original = read_trained(cfg, checkpoint)
    pruned, options = outcome.pruned, outcome.options
    meta = {
        **{k: v for k, v in original.meta.items() if k == 'dataset_meta'},
        'costs': costs_in_numbers(pruned.totals, pruned.full),
        **circumstances(options),
        'input_shape': list(outcome.shape),
    }
    architecture = copy.deepcopy(cfg.model.to_dict())
    parts = (pruned.structure, original.model, pruned.model, meta)
    return deploy(cfg, Deployable(architecture, *parts), out, name)


def cells(outcome: Outcome) -> list[list[str]]:
    """Return the table: a header, the original and the pruned model."""
    header, sizes = size_cells(outcome.rows)
    table = [['model', *([outcome.metric] if outcome.metric else []), *header]]
    for row, size in zip(outcome.rows, sizes, strict=True):
        metric = [f'{row["metric"]:.1f}'] if outcome.metric else []
        table.append([row['model'], *metric, *size])
    return table


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return all that is known of a result, in plain types for JSON."""
    return {
        'rows': outcome.rows,
        'metric': outcome.metric,
        'input_shape': list(outcome.shape),
        'seconds': outcome.seconds,
        'rounds': [
            {
                'target': {r.target.cost: r.target.ratio},
                'units': len(r.units),
                'layers': [asdict(layer) for layer in r.layers],
                'norms': list(r.norms),
            }
            for r in outcome.pruned.rounds
        ],
    }


def left_alone(outcome: Outcome) -> list[str]:
    """Return a line for each reason why layers were not refitted in the last cut."""
    layers = outcome.pruned.rounds[-1].layers
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    return [
        f'{count} of {len(layers)} layers keep their weights: {why}'
        for why, count in reasons.most_common()
    ]
