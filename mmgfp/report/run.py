"""All that the folder of a run says about it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmgfp.report.history import SCALARS, History, read_history
from mmgfp.report.quantities import (
    PROCESSOR,
    RUNTIMES,
    Quantity,
    main_metric,
    quantities_of,
    ratio_key,
)
from mmgfp.report.snapshot import Cost, Snapshot, read_snapshot
from mmgfp.utils.errors import ConfigError

#: Checkpoints of training, which are large and say nothing of what was pruned.
TRAINING = re.compile(r'(best_.+_)?(iter|epoch)_\d+|rounds')
REMEDY = (
    'name a folder that a pruning run, tools/prune.py or tools/deploy_pruned.py wrote'
)


@dataclass(frozen=True)
class Row:
    """A model in a table of costs.

    Attributes:
        name: Its name for people.
        values: What it costs.
        ratios: Shares of the first row's, where they were measured otherwise than by
            dividing two values.
        metric: How well it does, if it was tested.
    """

    name: str
    values: dict[Quantity, float]
    ratios: dict[Quantity, float] = field(default_factory=dict)
    metric: float | None = None

    def ratio(self, quantity: Quantity, first: Row) -> float | None:
        """Return the share of the first row's; None if one of them lacks it."""
        if quantity in self.ratios:
            return self.ratios[quantity]
        if quantity not in self.values or not first.values.get(quantity):
            return None
        return self.values[quantity] / first.values[quantity]


@dataclass(frozen=True)
class CostTable:
    """Models side by side, the first of them not pruned.

    Attributes:
        source: The file that it is taken from.
        rows: The models.
        metric: The name of the metric; None if nothing was tested.
        input_shape: Size (C, H, W) of the image that costs are counted for, if known.
    """

    source: Path
    rows: tuple[Row, ...]
    metric: str | None = None
    input_shape: tuple[int, ...] | None = None

    @property
    def quantities(self) -> list[Quantity]:
        """All quantities of some row, in order."""
        return list(dict.fromkeys(q for row in self.rows for q in row.values))

    @property
    def times(self) -> set[str]:
        """Keys of the times that were measured."""
        return {q.key for q in self.quantities} & {*RUNTIMES, *PROCESSOR}

    def covers(self, other: CostTable) -> bool:
        """Return whether this shows all quantities of another, for the same image."""
        is_same = None in (self.input_shape, other.input_shape) or (
            self.input_shape == other.input_shape
        )
        return is_same and {*other.quantities} <= {*self.quantities}

    def has(self, cost: Cost) -> bool:
        """Return whether a row shows a cost of a pruned model."""
        shown = (
            (quantity.label, quantity.text(value))
            for row in self.rows[1:]
            for quantity, value in row.values.items()
        )
        return (cost.quantity.label, cost.text) in shown


@dataclass(frozen=True)
class Run:
    """The content of the folder of a run.

    Attributes:
        name: The folder's name.
        folder: The folder.
        snapshots: The pruned models, in the order in which they were reached.
        history: What was logged while pruning.
        finetuning: What was logged while the result was fine-tuned.
        tables: Costs before and after, from each file that has some.
    """

    name: str
    folder: Path
    snapshots: tuple[Snapshot, ...]
    history: History
    finetuning: History
    tables: tuple[CostTable, ...]

    @property
    def costed(self) -> list[Snapshot]:
        """Pruned models whose files name costs."""
        return [snapshot for snapshot in self.snapshots if snapshot.costs]

    @property
    def costs_apart(self) -> list[Quantity]:
        """Costs of the pruned models that the tables do not show for each of them."""
        apart = (
            cost.quantity
            for snapshot in self.costed
            for cost in snapshot.costs
            if not any(table.has(cost) for table in self.tables)
        )
        return list(dict.fromkeys(apart))

    @property
    def timed_in(self) -> set[str]:
        """Keys of the times that were measured."""
        return {key for table in self.tables for key in table.times}

    @property
    def has_rois(self) -> bool:
        """Whether it is a two-stage detector's."""
        layers = (layer for s in self.snapshots for layer in s.widths)
        return any(layer.startswith('roi_head.') for layer in layers)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, named so that each can be told from the others.

    Raises:
        ConfigError: If one of them is no folder, or of no run.
        StructureError: If a checkpoint is damaged.
    """
    names = _names([folder.resolve() for folder in folders])
    return [read_run(*pair) for pair in zip(folders, names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many as tell them apart."""
    for count in range(1, max(len(f.parts) for f in folders)):
        names = ['/'.join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """Read what a run left in its folder.

    Args:
        folder: The work directory of a pruning run or of tools/prune.py, or what
            tools/deploy_pruned.py wrote.
        name: Its name for people.

    Raises:
        ConfigError: If it is no folder, or of no run.
        StructureError: If a checkpoint is damaged.
    """
    if not folder.is_dir():
        got = f'the file {folder}' if folder.exists() else f'nothing at {folder}'
        raise ConfigError('WORK_DIR', 'the folder of a run', got, REMEDY)
    # A sequence of stages has a folder for each.
    snapshots = _snapshots([folder, folder / 'prune'])
    snapshots = snapshots or _snapshots([folder / 'deploy'])
    has_stage = any((folder / 'prune').glob(SCALARS))
    history = read_history(folder / 'prune' if has_stage else folder)
    tables = [
        table
        for file in ('results.json', 'summary.json', 'deploy/summary.json')
        if (folder / file).is_file()
        for table in [_table(folder / file)]
    ]
    by_file = {str(table.source.relative_to(folder)): table for table in tables}
    results, deployed = map(by_file.get, ('results.json', 'deploy/summary.json'))
    if results and deployed and results.covers(deployed):
        tables.remove(deployed)  # timed beside the others there
    if not (snapshots or tables or history.shares):
        got = f'{folder}, where nothing says what was pruned'
        raise ConfigError('WORK_DIR', 'the folder of a run', got, REMEDY)
    finetuning = read_history(folder / 'finetune')
    parts = (tuple(snapshots), history, finetuning, tuple(tables))
    return Run(name, folder, *parts)


def _snapshots(folders: Iterable[Path]) -> list[Snapshot]:
    """Read the pruned models in some folders."""
    snapshots = []
    for folder in folders:
        configs = sorted(path.stem for path in folder.glob('*.py'))
        is_deployed = (folder / 'structure.json').is_file()
        for path in sorted(folder.glob('*.pth')):
            if not is_deployed and TRAINING.fullmatch(path.stem):
                continue
            prefixes = (f'{c}_' for c in configs if path.stem.startswith(f'{c}_'))
            label = path.stem.removeprefix(next(prefixes, ''))
            snapshot = read_snapshot(path, label)
            snapshots += [] if snapshot is None else [snapshot]
    return sorted(snapshots, key=lambda s: (s.iteration or 0, s.label))


def _table(path: Path) -> CostTable:
    """Read costs before and after from a JSON file of one of the tools.

    Raises:
        ConfigError: If it is of another kind.
    """
    try:
        data = json.loads(path.read_text())
        rows = data.get('rows')
        if rows is None:  # of deploy_pruned.py, by name
            rows = [{'model': name, **data[name]} for name in ('original', 'pruned')]
        metric = data.get('metric')
        if rows[0].get('metrics') is not None:
            metric = main_metric(rows[0]['metrics'])[0]
        elif isinstance(rows[0].get('metric'), Mapping):  # of several seeds
            metric = f'{rows[0]["metric"]["name"]} (mean)'
        shape = tuple(data['input_shape']) if data.get('input_shape') else None
        return CostTable(path, tuple(map(_row, rows)), metric, shape)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        got = f'{type(error).__name__}: {error}'
        expected = 'a summary of mmgfp with costs before and after'
        raise ConfigError(str(path), expected, got, 'move it away') from error


def _row(raw: Mapping[str, Any]) -> Row:
    metric = raw.get('metric')
    if raw.get('metrics') is not None:  # COCO has none where nothing is detected
        metric = main_metric(raw['metrics'])[1]
    elif isinstance(metric, Mapping):
        metric = metric['mean']
    ratios = {key: raw.get(ratio_key(key)) for key in (*RUNTIMES, *PROCESSOR)}
    measured = quantities_of({k: r for k, r in ratios.items() if r is not None})
    name = ' '.join(filter(None, (str(raw['model']), raw.get('target'))))
    return Row(name, quantities_of(raw), measured, metric)
