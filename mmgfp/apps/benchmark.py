"""Times and memory of models side by side in several runtimes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from mmgfp.apps.subjects import (
    EAGER,
    Subject,
    build_graph,
    is_file,
    peak_memory,
    resolve,
)
from mmgfp.export.onnx_file import write_onnx
from mmgfp.export.options import ExportOptions
from mmgfp.runtimes import RUNTIMES, open_model
from mmgfp.runtimes.timing import ratios, spread, take_turns
from mmgfp.utils.errors import ConfigError

WARMUP = 2
#: Why a ratio may differ from that of the times beside it.
PAIRED = (
    'Each cell: the median, and the quartiles below. Ratios are taken within each '
    'round, and their median is shown: what slows a whole round cancels out, and after '
    'few rounds they need not be the ratios of the median times.'
)


def say(line: str) -> None:
    """Tell on the error stream what takes time."""
    print(f'... {line}', file=sys.stderr, flush=True)


def subjects_of(
    sources: Sequence[str],
    runtimes: Sequence[str],
    size: Sequence[int],
    outputs: str,
    threads: int,
    folder: Path,
) -> tuple[dict[tuple[str, str], Subject], list[str]]:
    """Prepare models for runtimes: those of configs are exported for all but PyTorch.

    Args:
        sources: What the user names: files, folders, ``CONFIG:CHECKPOINT``.
        runtimes: ``torch`` and names in `mmgfp.runtimes.RUNTIMES`; a TorchScript file
            runs where ``torch`` is asked for.
        size: (N, C, H, W).
        outputs: 'raw' or 'end-to-end', of models of configs.
        threads: Threads that a run may use.
        folder: Where exported files go.

    Returns:
        Subjects by source and runtime, and a line for each that there cannot be.
    """
    subjects, notes = {}, []
    for number, source in enumerate(sources):
        file = resolve(source)
        exported: Exception | None = None
        if not is_file(file) and set(runtimes) - {EAGER}:
            path = folder / f'{number}_{size[0]}.onnx'
            say(f'exporting {source} for a batch of {size[0]}')
            graph = build_graph(file, outputs, size)
            try:
                write_onnx(path, graph, torch.rand(*size), ExportOptions(), {})
            except Exception as error:  # exporters raise many kinds
                exported = error
        for runtime in runtimes:
            subject = Subject(file, runtime, tuple(size), outputs, threads)
            if is_file(file):
                runtime = 'torchscript' if runtime == EAGER else runtime
                if Path(file).suffix not in RUNTIMES[runtime].suffixes:
                    continue
                subject = replace(subject, runtime=runtime)
            elif runtime != EAGER:
                if exported is not None:
                    words = ' '.join(str(exported).split())[:200]
                    notes.append(f'{source} cannot be exported for {runtime}: {words}')
                    continue
                subject = replace(subject, source=str(path))
            subjects[source, runtime] = subject
    return subjects, notes


def measure_batch(
    subjects: dict[tuple[str, str], Subject], rounds: int, memory: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time subjects of one batch size in turns, and measure their memory.

    Args:
        subjects: By source and runtime.
        rounds: Timed runs of each.
        memory: Whether each is also run in a process of its own.

    Returns:
        A row for each, with ratios to the first model in the same runtime, the `base`;
        and a line for each that could not be opened.
    """
    actions: dict[str, Callable[[], Any]] = {}
    kept, notes = {}, []
    for (source, runtime), subject in subjects.items():
        try:
            action = subject.open()
        except ConfigError as error:
            notes.append(f'{source} is not measured in {runtime}: {error}')
            continue
        label = f'{source} {runtime}'
        actions[label], kept[label] = action, (source, runtime, subject)
    if not actions:
        return [], notes
    say(f'timing {len(actions)} in turns, {rounds} rounds and {WARMUP} before')
    times = take_turns(actions, rounds, 'cpu', WARMUP, twice=True)
    first: dict[str, str] = {}
    rows = []
    for label, (source, runtime, subject) in kept.items():
        row: dict[str, Any] = {
            'model': source,
            'runtime': runtime,
            'batch': subject.size[0],
            'input': list(subject.size[1:]),
            'base': kept[first.setdefault(runtime, label)][0],
        }
        for clock in ('wall', 'cpu'):
            row[f'{clock}_ms'] = spread([t[clock] * 1e3 for t in times[label]])
            row[f'{clock}_ratio'] = spread(ratios(times, label, first[runtime], clock))
        if memory:
            say(f'measuring the memory of {source} in {runtime}')
            row |= peak_memory(subject)
        rows.append(row)
    return rows, notes


def fixed_size(source: str, runtimes: Sequence[str]) -> tuple[int | None, ...] | None:
    """Return the size (N, C, H, W) that a file fixes, None where a side is free.

    Returns:
        None if it is no file, or one that tells no size.
    """
    if not is_file(source):
        return None
    names = ['torchscript' if name == EAGER else name for name in runtimes]
    opens = [n for n in names if Path(source).suffix in RUNTIMES[n].suffixes]
    if not opens:
        raise ConfigError(
            f'--runtime for {source}',
            f'one that opens {Path(source).suffix} files',
            ', '.join(runtimes),
            'add it',
        )
    sizes = list(open_model(source, opens[0]).inputs.values())
    if len(sizes) != 1 or len(sizes[0]) != 4:
        return None
    number, *sides = sizes[0]
    # Files that prepare images themselves read (N, H, W, C).
    if sides[2] in (1, 3) and sides[0] not in (1, 3):
        sides = [sides[2], *sides[:2]]
    return number, *sides


def time_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay out rows of `measure_batch` in 80 columns; names of models stand above."""
    names = distinct_names([row['model'] for row in rows])
    numbers = {source: str(i) for i, source in enumerate(names, 1)}
    legend = '\n'.join(f'{numbers[source]}: {names[source]}' for source in names)
    table = Table('#', 'runtime', box=None, title=Text(legend), title_justify='left')
    table.caption, table.caption_justify, table.caption_style = PAIRED, 'left', ''
    table.title_style, table.padding, table.pad_edge = '', (0, 1, 0, 0), False
    titles = ['batch', 'wall (ms)', 'CPU (ms)']
    titles += [f'{clock} to\nfirst of\nruntime' for clock in ('wall', 'CPU')]
    for title in [*titles, 'peak\n(growth)\nin MiB']:
        table.add_column(title, justify='right')
    for row in rows:
        cells = [_spread_text(row[k], '.1f') for k in ('wall_ms', 'cpu_ms')]
        cells += [_spread_text(row[k], '.2f') for k in ('wall_ratio', 'cpu_ratio')]
        peak, growth = row.get('peak_mb'), row.get('growth_mb')
        cells.append('-' if peak is None else f'{peak:.0f}\n({growth:.0f})')
        number = numbers[row['model']]
        table.add_row(number, row['runtime'], str(row['batch']), *cells)
    for column in table.columns:
        column.no_wrap, column.overflow = True, 'fold'
    return table


def distinct_names(sources: Sequence[str]) -> dict[str, str]:
    """Return each source without the folders that all of them begin with.

    Examples:
        >>> list(distinct_names(['out/base/m.onnx', 'out/pruned/m.onnx']).values())
        ['base/m.onnx', 'pruned/m.onnx']
        >>> distinct_names(['out/model.onnx'])
        {'out/model.onnx': 'model.onnx'}
    """
    parts = {source: source.rstrip('/').split('/') for source in sources}
    shared = os.path.commonprefix([names[:-1] for names in parts.values()])
    return {source: '/'.join(names[len(shared) :]) for source, names in parts.items()}


def _spread_text(values: dict[str, float], form: str) -> str:
    low, high = (format(values[key], form) for key in ('low', 'high'))
    return f'{values["median"]:{form}}\n{low}-{high}'
