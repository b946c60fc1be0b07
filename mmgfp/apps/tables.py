"""Tables that compare a model before and after pruning."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmgfp.report.quantities import RUNTIMES, main_metric, ratio_key
from mmgfp.selection.costs import COSTS
from mmgfp.utils.words import counted

#: By how much shares of times and times may disagree, as a share.
MOST_DISTURBED = 0.15
#: Where mmgfp's code lies, in a checkout or among installed packages.
CHECKOUT = Path(__file__).resolve().parents[2]
#: Names of the packages whose versions are reported: both OpenMMLab lines, and torch.
PREFIXES = ('mm', 'onedl-mm', 'torch')


def machine_facts() -> dict[str, Any]:
    """Collect the processor, threads, versions and commit that numbers come from."""
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
        'commit': commit_of(CHECKOUT),
    }


def commit_of(folder: Path) -> str | None:
    """Return a checkout's commit, ``-dirty`` if it was changed; None for others."""
    git = ('git', '-C', str(folder))
    try:
        above, commit = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True)
            for words in (
                ['rev-parse', '--show-prefix'],
                ['describe', '--always', '--dirty'],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    # Installed packages may lie in somebody else's checkout.
    return None if above.stdout.strip() else commit.stdout.strip()


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if 'model name' in line]
    return names[0] if names else platform.processor() or platform.machine()


def table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Format results, with costs also as a share of the first row's.

    Args:
        rows: For each model its name `model`, the dict `metrics` unless none was
            tested, and its costs by their names in `COSTS`; optionally milliseconds by
            batch size under the keys of `RUNTIMES`, and their shares of the first row's
            under `ratio_key` of these.

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
    tested = 'metrics' in rows[0]
    header, sizes = size_cells(rows)
    names = [main_metric(rows[0]['metrics'])[0]] if tested else []
    cells = [['model', *names, *header]]
    for row, size in zip(rows, sizes, strict=True):
        metric = [f'{main_metric(row["metrics"])[1]:.1f}'] if tested else []
        cells.append([row['model'], *metric, *size])
    return cells


def size_cells(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Format costs and times of `table_cells`.

    Returns:
        The header, and the cells of each row.
    """
    first = rows[0]
    timed = {
        (key, n): f'CPU, {name}{"" if n == "1" else f", batch {n}"} (ms)'
        for key, name in RUNTIMES.items()
        for n in first.get(key, {})
    }
    costs = {name: COSTS[name] for name in COSTS.names() if name in first}
    header = [f'{cost.label} ({cost.unit})' for cost in costs.values()]
    cells = []
    for row in rows:
        sizes = [
            _cost(row[key] / cost.scale, row[key] / first[key], '#.4g')
            for key, cost in costs.items()
        ]
        for key, n in timed:
            time = row.get(key, {}).get(n)
            if time is None:
                sizes.append('')
                continue
            # Taken round by round, where all models took turns.
            share = (row.get(ratio_key(key)) or {}).get(n, time / first[key][n])
            sizes.append(_cost(time, share, '.1f'))
        cells.append(sizes)
    return [*header, *timed.values()], cells


def _cost(value: float, share: float, form: str) -> str:
    return f'{format(value, form).rstrip(".")} ({share:.0%})'


def disturbed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line if times and their shares disagree, else nothing.

    Beside other work, the median of the ratios of rounds is not the ratio of medians.

    Args:
        rows: The rows of `table_cells`.

    Examples:
        >>> rows = [dict(latency_ms={'1': 30.0}), dict(latency_ms={'1': 15.0})]
        >>> disturbed([rows[0], rows[1] | dict(latency_ratio={'1': 0.55})])
        ''
        >>> disturbed([rows[0], rows[1] | dict(latency_ratio={'1': 0.6})]) != ''
        True
    """
    first = rows[0]
    for row in rows[1:]:
        for key in RUNTIMES:
            for batch, share in (row.get(ratio_key(key)) or {}).items():
                of_medians = row[key][batch] / first[key][batch]
                if abs(share / of_medians - 1) > MOST_DISTURBED:
                    return (
                        'Shares and times disagree, as where other work disturbs them: '
                        'processor time, in results.json and the report, is steadier.'
                    )
    return ''


def markdown(cells: Sequence[Sequence[str]], facts: Mapping[str, Any]) -> str:
    """Render a table and how it was measured as Markdown.

    Args:
        cells: The cells of `table_cells`.
        facts: The facts of `machine_facts`, and `configs`, `input_shape`, `seed` and
            `seconds` by stage; optionally the `command`, lines on the runs in `notes`,
            and whether the model is `two_stage`.

    Returns:
        The text of a section, without a heading.
    """
    versions = ', '.join(f'{name} {v}' for name, v in facts['versions'].items())
    stages = ', '.join(f'{stage} {s} s' for stage, s in facts['seconds'].items())
    shape = '×'.join(str(size) for size in facts['input_shape'])
    threads = counted(facts['threads'], 'thread')
    commit = f'; code of commit {facts["commit"]}' if facts.get('commit') else ''
    lines = [
        *markdown_table(cells),
        '',
        'MACs count one multiply-add as one; memory is the number of elements that',
        f'all layers output; both for one {shape} image.',
        *_on_times(cells[0], facts.get('two_stage', False)),
        '',
        f'- configs: {", ".join(f"`{path}`" for path in facts["configs"])}',
        *([f'- command: `{facts["command"]}`'] if 'command' in facts else []),
        *(f'- {note}' for note in facts.get('notes', ())),
        f'- seed {facts["seed"]}; {facts["cpu"]}, {threads}',
        f'- Python {facts["python"]}, {versions}{commit}',
        f'- wall-clock time: {stages} (of the last run, where one was cut off)',
    ]
    return '\n'.join(lines) + '\n'


def _on_times(header: Sequence[str], is_two_stage: bool) -> list[str]:
    """Return lines on the times of a table, if it has any."""
    timed = [name for name in header if name.startswith('CPU, ')]
    if not timed:
        return []
    lines = [
        'CPU is the median time of the network for that image, or for a batch of such,',
        'up to its raw outputs; its share is the median of the ratios of each round in',
        'which models took turns: after few rounds, it need not be that of the times.',
    ]
    if is_two_stage and any('onnxruntime' in name for name in timed):
        lines.append('onnxruntime runs what comes before the RoIs.')
    return lines


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: a header, a rule, and one line a row.

    Examples:
        >>> markdown_table([['model', 'mAP'], ['small', '37.5']])
        ['| model | mAP |', '|---|---:|', '| small | 37.5 |']
    """
    lines = [f'| {" | ".join(row)} |' for row in cells]
    return [lines[0], '|---' + '|---:' * (len(cells[0]) - 1) + '|', *lines[1:]]


def print_table(cells: Sequence[Sequence[str]]) -> None:
    """Print a table to the terminal."""
    table = Table(cells[0][0])
    for name in cells[0][1:]:
        table.add_column(name, justify='right', no_wrap=True)
    for row in cells[1:]:
        table.add_row(*row)
    # As wide as it takes: what a terminal wraps can be read, what is cut off cannot.
    widths = (max(map(len, column)) + 3 for column in zip(*cells, strict=True))
    Console(width=max(Console().width, sum(widths) + 1)).print(table)
