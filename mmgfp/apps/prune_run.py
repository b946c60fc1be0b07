"""Pruning a config's model without training: what `tools/prune.py` does."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmgfp.apps.analysis import costs_of, counted_costs, without_predictions
from mmgfp.apps.dead_branches import lines_of, without_dead_branches
from mmgfp.apps.input_shape import size_in_testing
from mmgfp.apps.prune_recipe import Recipe
from mmgfp.apps.refitting_data import LEAST_BATCHES
from mmgfp.apps.rounds_file import RoundsFile
from mmgfp.apps.scoring_data import ScoringData, with_labels, without_labels
from mmgfp.apps.sensitivity_run import Validation, validation_config
from mmgfp.apps.shown_steps import CountedLoss, Steps, round_line, shown_steps
from mmgfp.apps.tables import size_cells
from mmgfp.config import PruningConfig
from mmgfp.discovery.dead import DeadBranches
from mmgfp.engine.artifact import choices, circumstances, costs_in_numbers
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.deploy import Deployable, Trained, read_trained
from mmgfp.rounds import Journal, Pruned, Round
from mmgfp.selection.costs import COSTS
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.utils.errors import ConfigError
from mmgfp.without_training import prune_without_training


@dataclass(frozen=True)
class Outcome:
    """A model that was pruned, and what it was before.

    Attributes:
        original: The model before.
        pruned: The result.
        options: The options of pruning.
        shape: Size (C, H, W) of the image that costs are counted for.
        rows: For the original and the pruned model, the name, costs, and the metric
            where there are images to test on.
        metric: The metric's name, None if nothing was tested.
        seconds: How long pruning took, without tests.
        dead: What went because nothing reads it.
    """

    original: Trained
    pruned: Pruned
    options: PruningConfig
    shape: Sequence[int]
    rows: list[dict[str, Any]]
    metric: str | None
    seconds: float
    dead: DeadBranches


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
    options = recipe.options
    with shown_steps() as steps:
        steps.begin('reading images')
        data = _scoring_data(cfg, model, recipe)
    shape, source = _shape(cfg, data, options)
    print(f'costs are counted for an image of {tuple(shape)}, {source}')
    clock = _Clock(file.seconds)
    with shown_steps() as steps:
        if file.state is not None:
            steps.say(f'going on after cut {file.rounds}, from {file.path}')
        pruned = prune_without_training(
            model,
            [CountedLoss(loss, steps) for loss in data.losses],
            data.calls.forward,
            data.calls.images,
            options,
            recipe.compensation,
            recipe.shares[:-1],
            data.calls.profile(model, shape),
            data.tracing_loss,
            Journal(steps.begin, partial(_after, file, steps, clock), file.state),
        )
    seconds = clock.seconds
    pruned, dead = _without_dead_branches(cfg, original, pruned)
    # Tests come last, as a target may be refused when channels are found.
    models = {'original': model, 'pruned': pruned.model}
    rows, metric = _rows(data.calls, shape, models, validation)
    return Outcome(original, pruned, options, shape, rows, metric, seconds, dead)


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


def _after(
    file: RoundsFile, steps: Steps, clock: _Clock, done: Round, state: Mapping[str, Any]
) -> None:
    """Keep the state after a round, and say how it went."""
    file.write(state, clock.seconds)
    steps.say(round_line(len(state['rounds']), done, clock.seconds))


def _rows(
    calls: BatchCalls,
    shape: Sequence[int],
    models: Mapping[str, nn.Module],
    validation: Validation | None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Return costs of models, with a metric and its name if they are tested."""
    rows, metric = [], None
    for name, model in models.items():
        row = {'model': name, **costs_of(model, calls.profile(model, shape))}
        if validation is not None:
            metric, row['metric'] = validation(model)
        rows.append(row)
    return rows, metric


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


def deployable(cfg: Config, outcome: Outcome) -> Deployable:
    """Return the pruned model with all that its files say of it.

    Args:
        cfg: The config of the unpruned model.
        outcome: The result.
    """
    pruned, options, original = outcome.pruned, outcome.options, outcome.original
    facts = (pruned.discovery, pruned.kept, pruned.importance, pruned.limits)
    costs = costs_in_numbers(pruned.totals, pruned.full)
    if outcome.dead.names:
        costs = without_predictions(costs)
    meta = {
        **{k: v for k, v in original.meta.items() if k == 'dataset_meta'},
        # Of the model as it is written, without what nothing reads.
        'costs': costs | counted_costs(*outcome.rows),
        **circumstances(options),
        **choices(options, *facts),
        'input_shape': list(outcome.shape),
    }
    architecture = copy.deepcopy(cfg.model.to_dict())
    parts = (pruned.structure, original.model, pruned.model, meta)
    return Deployable(architecture, *parts)


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


def beyond_target(outcome: Outcome) -> str:
    """Return a line on why clearly less is left than was asked for, or nothing."""
    (target,), pruned = outcome.options.targets, outcome.pruned
    cost = COSTS.canonical(target.cost)
    full, now = (row.get(cost) for row in outcome.rows)
    if not full or now / full > target.ratio - 0.01:
        return ''
    cut, divisor = pruned.rounds[-1].share, pruned.limits.divisor
    reasons = []
    if cut < target.ratio - 0.005 and divisor > 1:
        reasons.append(f'widths come to rest at multiples of {divisor} (--divisor)')
    if outcome.dead.names and now / full < cut - 0.005:
        reasons.append('what nothing reads went after the last cut')
    why = f': {" and ".join(reasons)}' if reasons else ''
    return (
        f'{now / full:.1%} of {target.cost} are left, {target.ratio:.0%} were asked '
        f'for; the last cut ended at {cut:.1%}{why}'
    )


def left_alone(outcome: Outcome) -> list[str]:
    """Return a line for each reason why something stayed as it was.

    Groups may be too narrow to be pruned; layers, not be refitted in the last cut.
    """
    pruned = outcome.pruned
    narrow = NarrowGroups.of(pruned.limits, pruned.discovery.grouping)
    narrow = narrow.left_in(pruned.structure)
    layers = pruned.rounds[-1].layers
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    return ([narrow.text] if narrow.text else []) + [
        f'{count} of {len(layers)} layers keep their weights: {why}'
        for why, count in reasons.most_common()
    ]
