"""Pruning a config's model without training: what `tools/prune.py` does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmgfp.apps.analysis import costs_of
from mmgfp.apps.dead_branches import lines_of, without_dead_branches
from mmgfp.apps.input_shape import size_in_testing
from mmgfp.apps.prune_outcome import Outcome
from mmgfp.apps.prune_recipe import Recipe
from mmgfp.apps.refitting_data import LEAST_BATCHES
from mmgfp.apps.rounds_file import RoundsFile
from mmgfp.apps.scoring_data import ScoringData, with_labels, without_labels
from mmgfp.apps.sensitivity_run import Validation, validation_config
from mmgfp.apps.shown_steps import CountedLoss, Steps, round_line, shown_steps
from mmgfp.config import PruningConfig
from mmgfp.discovery.dead import DeadBranches
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.deploy import Deployable, Trained, read_trained
from mmgfp.rounds import Journal, Pruned, Round
from mmgfp.utils.errors import ConfigError
from mmgfp.without_training import prune_without_training


def validation_of(
    cfg: Config, checkpoint: str, metric: str | None, images: int | None, logs: Path
) -> Validation | None:
    """Return what tests models on the config's validation set, None without any."""
    if images == 0:
        return None
    if not cfg.get('val_dataloader') and not cfg.get('test_dataloader'):
        print('the config has neither val_dataloader nor test_dataloader: not tested')
        return None
    return Validation(validation_config(cfg, images, logs), checkpoint, metric)


def prune(
    cfg: Config,
    checkpoint: str,
    recipe: Recipe,
    validation: Validation | None,
    file: RoundsFile,
) -> Outcome:
    """Prune a config's model without training, and test it before and after.

    Args:
        cfg: Its config.
        checkpoint: Its weights.
        recipe: How it is pruned.
        validation: Tests models; None does without.
        file: Keeps the state after each round, and may hold one to go on from.

    Raises:
        ConfigError: If the config's model is pruned already, or has no training data.
    """
    original = _unpruned(cfg, checkpoint)
    model: Any = original.model
    with shown_steps() as steps:
        steps.begin('reading images')
        data = _scoring_data(cfg, model, recipe)
    shape, source = _shape(cfg, data, recipe.options)
    print(f'costs are counted for an image of {tuple(shape)}, {source}')
    clock = _Clock(file.seconds)
    rows = _Rows(data.calls, shape, validation, clock)
    with shown_steps() as steps:
        if file.state is not None:
            steps.say(f'going on after cut {file.rounds}, from {file.path}')

        def test_first() -> None:
            steps.begin('testing the original')
            rows.add('original', model)

        after_round = partial(_after, file, steps, clock)
        journal = Journal(steps.begin, test_first, after_round, file.state)
        counted = [CountedLoss(loss, steps) for loss in data.losses]
        pruned = _pruned(model, replace(data, losses=counted), shape, recipe, journal)
    seconds = clock.seconds
    pruned, dead = _without_dead_branches(cfg, original, pruned)
    rows.add('pruned', pruned.model)
    facts = (recipe.options, shape, rows.rows, rows.metric, seconds, dead)
    return Outcome(original, pruned, *facts)


def _pruned(
    model: Any,
    data: ScoringData,
    shape: Sequence[int],
    recipe: Recipe,
    journal: Journal,
) -> Pruned:
    return prune_without_training(
        model,
        data.losses,
        data.calls.forward,
        data.calls.images,
        recipe.options,
        recipe.compensation,
        recipe.shares[:-1],
        data.calls.profile(model, shape),
        data.tracing_loss,
        journal,
    )


def _scoring_data(cfg: Config, model: Any, recipe: Recipe) -> ScoringData:
    """Return what a model is scored by; only refitting holds batches out."""
    read = without_labels if recipe.label_free else with_labels
    least = 1 if recipe.compensation is None else LEAST_BATCHES
    return read(cfg, model, recipe.images, recipe.batch_size, least)


def _shape(
    cfg: Config, data: ScoringData, options: PruningConfig
) -> tuple[Sequence[int], str]:
    """Return the size (C, H, W) for which costs are counted, and where it is from."""
    if options.input_shape is not None:
        return options.input_shape, 'as --input-shape or the config says'
    if size := size_in_testing(cfg):
        return (data.shape[0], *size), 'as images are resized for testing'
    return data.shape, 'as in the first batch'


def _without_dead_branches(
    cfg: Config, original: Trained, pruned: Pruned
) -> tuple[Pruned, DeadBranches]:
    """Return a model without what nothing reads, and what that is; say so."""
    parts = (pruned.structure, original.model, pruned.model, original.meta)
    item, dead = without_dead_branches(cfg, Deployable(cfg.model.to_dict(), *parts))
    for line in lines_of(dead):
        print(line)
    return replace(pruned, model=item.model, structure=item.structure), dead


class _Clock:
    """Seconds since it was made, and those before.

    Args:
        before: Seconds that count as well.
    """

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what the block takes."""
        began = time.monotonic()
        yield
        self._start += time.monotonic() - began


@dataclass
class _Rows:
    """Costs of models, with a metric if they are tested."""

    calls: BatchCalls
    shape: Sequence[int]
    validation: Validation | None
    clock: _Clock
    rows: list[dict[str, Any]] = field(default_factory=list)
    metric: str | None = None

    def add(self, name: str, model: nn.Module) -> None:
        """Add a row; the clock does not count what it takes."""
        with self.clock.stopped():
            costs = costs_of(model, self.calls.profile(model, self.shape))
            row = {'model': name, **costs}
            if self.validation is not None:
                self.metric, row['metric'] = self.validation(model)
            self.rows.append(row)


def _after(
    file: RoundsFile, steps: Steps, clock: _Clock, done: Round, state: Mapping[str, Any]
) -> None:
    """Keep the state after a round, and say how it went."""
    file.write(state, clock.seconds)
    steps.say(round_line(len(state['rounds']), done, clock.seconds))


def _unpruned(cfg: Config, checkpoint: str) -> Trained:
    """Return a config's model with its weights; refuse one that is pruned."""
    trained = read_trained(cfg, checkpoint)
    if trained.structure is not None:
        raise ConfigError(
            'CONFIG and CHECKPOINT',
            'of a model that is not pruned',
            'a pruned one',
            'give those of the original, with a lower --target',
        )
    return trained
