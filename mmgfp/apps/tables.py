"""Tables that compare a model before and after pruning."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmgfp.apps.latency import RUNTIMES
from mmgfp.selection.costs import COSTS

#: Names of the packages whose versions are reported: both OpenMMLab lines, and torch.
PREFIXES = ('mm', 'onedl-mm', 'torch')


def machine_facts() -> dict[str, Any]:
    """Collect the processor, threads and versions that numbers were measured with."""
    versions = {
        dist.name: dist.version
        for dist in distributions()
        if dist.name.startswith(PREFIXES)
    }
    return {
        'cpu': _cpu_name(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'versions': dict(sorted(versions.items())),
    }


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if 'model name' in line]
    return names[0] if names else platform.processor() or platform.machine()


def main_metric(metrics: Mapping[str, float]) -> tuple[str, float]:
    """Pick the headline of a test: COCO's mAP or top-1 accuracy, both in percent.

    No metrics at all, as COCO's evaluation returns for a model that detects nothing,
    count as an mAP of 0.

    Examples:
        >>> main_metric({'coco/bbox_mAP': 0.375, 'coco/bbox_mAP_50': 0.5})
        ('mAP', 37.5)
    """
    if not metrics or 'coco/bbox_mAP' in metrics:
        return 'mAP', metrics.get('coco/bbox_mAP', 0.0) * 100
    if 'accuracy/top1' in metrics:
        return 'top-1', metrics['accuracy/top1']
    return next(iter(metrics.items()))


def table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Format results, with costs also as a share of the first row's.

    Args:
        rows: For each model its name `model`, the dict `metrics` and its costs by
            their names in `COSTS`; optionally the metrics of further tests by name in
            `also`, and milliseconds by batch size under the keys of `RUNTIMES`.

    Returns:
        The header, then one list of cells per row.

    Examples:
        >>> costs = dict(macs=4e9, memory=1e7, params=2e6)
        >>> row = dict(model='small', metrics={'accuracy/top1': 76.1}, **costs)
        >>> header, cells = table_cells([row])
        >>> header
        ['model', 'top-1', 'MACs (G)', 'memory (M)', 'params (M)']
        >>> cells
        ['small', '76.1', '4.000 (100%)', '10.00 (100%)', '2.000 (100%)']
    """
    first = rows[0]
    metric = main_metric(first['metrics'])[0]
    tests = list(first.get('also', {}))
    timed = {
        (key, n): f'CPU, {name}{"" if n == "1" else f", batch {n}"} (ms)'
        for key, name in RUNTIMES.items()
        for n in first.get(key, {})
    }
    costs = {name: COSTS[name] for name in COSTS.names() if name in first}
    cells = [
        [
            *('model', metric, *(f'{metric}, {name}' for name in tests)),
            *(f'{cost.label} ({cost.unit})' for cost in costs.values()),
            *timed.values(),
        ]
    ]
    for row in rows:
        metrics = [row['metrics'], *(row['also'][name] for name in tests)]
        cells.append(
            [
                row['model'],
                *(f'{main_metric(values)[1]:.1f}' for values in metrics),
                *(
                    _cost(row[key] / cost.scale, first[key] / cost.scale, '#.4g')
                    for key, cost in costs.items()
                ),
                *(_cost(row[key][n], first[key][n], '.1f') for key, n in timed),
            ]
        )
    return cells


def _cost(value: float, first: float, form: str) -> str:
    return f'{format(value, form).rstrip(".")} ({value / first:.0%})'


def markdown(cells: Sequence[Sequence[str]], facts: Mapping[str, Any]) -> str:
    """Render a table and how it was measured as Markdown.

    Args:
        cells: The cells of `table_cells`.
        facts: The facts of `machine_facts`, and `configs`, `input_shape`, `seed` and
            `seconds` by stage; optionally settings by variant in `variants`.

    Returns:
        The text of a section, without a heading.
    """
    lines = [f'| {" | ".join(row)} |' for row in cells]
    lines.insert(1, '|---' + '|---:' * (len(cells[0]) - 1) + '|')
    versions = ', '.join(f'{name} {v}' for name, v in facts['versions'].items())
    stages = ', '.join(f'{stage} {s} s' for stage, s in facts['seconds'].items())
    shape = '×'.join(str(size) for size in facts['input_shape'])
    lines += [
        '',
        'MACs count one multiply-add as one; memory is the number of elements that',
        f'all layers output; both for one {shape} image. CPU is the median time of the',
        'network for that image, or for a batch of such, without decoding boxes; of a',
        'two-stage detector onnxruntime runs what comes before the RoIs.',
        '',
        f'- configs: {", ".join(f"`{path}`" for path in facts["configs"])}',
        *(
            f'- {name}: `{", ".join(settings)}`'
            for name, settings in facts.get('variants', {}).items()
        ),
        f'- seed {facts["seed"]}; {facts["cpu"]}, {facts["threads"]} threads',
        f'- Python {facts["python"]}, {versions}',
        f'- wall-clock time: {stages}',
    ]
    return '\n'.join(lines) + '\n'


def print_table(cells: Sequence[Sequence[str]]) -> None:
    """Print a table to the terminal."""
    table = Table(cells[0][0])
    for name in cells[0][1:]:
        table.add_column(name, justify='right', no_wrap=True)
    for row in cells[1:]:
        table.add_row(*row)
    console = Console()
    console.print(table, width=max(100, console.width))
