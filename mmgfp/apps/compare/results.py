"""Means and spreads of a comparison's runs, as a table and for plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, isnan, nan
from statistics import mean, stdev
from typing import Any

from mmgfp.apps.tables import size_cells
from mmgfp.report.quantities import RUNTIMES, main_metric
from mmgfp.selection.costs import COSTS

#: Times of models: by key of `RUNTIMES`, batch size and the model's name.
Times = Mapping[str, Mapping[str, Mapping[str, float]]]


#: COCO's -1, in percent: no object of that kind was there to be found.
NOTHING = -100.0


def summarize(
    results: Sequence[Mapping[str, Any]],
    metric: str | None = None,
    times: Times | None = None,
) -> list[dict[str, Any]]:
    """Put runs that differ in their seeds together.

    Args:
        results: Results of runs, that of the baseline first.
        metric: The metric to compare; see `main_metric`.
        times: Milliseconds by runtime, batch size and run.

    Returns:
        A row for each variant and target: of the metric (and in ``also`` of further
        tests) the `spread_of` its values, of costs and times the means.

    Examples:
        >>> numbers = [(0, 4, 8), (1, 6, 9)]
        >>> runs = [dict(variant='a', target='', seed=seed, costs=dict(macs=macs),
        ...              metrics={'f1': f1}) for seed, macs, f1 in numbers]
        >>> (row,) = summarize(runs)
        >>> row['seeds'], row['macs'], row['metric']['mean'], row['metric']['values']
        ([0, 1], 5, 8.5, [8, 9])
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        key = result['variant'], result.get('target', '')
        groups.setdefault(key, []).append(result)
    rows = []
    for key, runs in groups.items():
        row: dict[str, Any] = {'model': key[0], 'target': key[1]}
        row['seeds'] = [run.get('seed') for run in runs]
        row['metric'] = spread_of([run['metrics'] for run in runs], metric)
        row['also'] = {
            name: spread_of([run['also'][name] for run in runs], metric)
            for name in runs[0].get('also', {})
        }
        for cost in runs[0]['costs']:
            row[cost] = mean(run['costs'][cost] for run in runs)
        for runtime, by_batch in (times or {}).items():
            for batch, by_run in by_batch.items():
                measured = [by_run[r['run']] for r in runs if r.get('run') in by_run]
                if len(measured) == len(runs):
                    row.setdefault(runtime, {})[batch] = mean(measured)
        rows.append(row)
    return rows


def spread_of(
    metrics: Sequence[Mapping[str, float]], name: str | None = None
) -> dict[str, Any]:
    """Return the mean and the spread of a metric over runs.

    Args:
        metrics: All metrics of each run.
        name: The metric; see `main_metric`.

    Returns:
        Its ``name``, the ``values`` in order, their ``mean`` and their sample standard
        deviation ``std`` (divided by n - 1), which is None for a single value.
    """
    picked = [main_metric(found, name) for found in metrics]
    values = [nan if value == NOTHING else value for _, value in picked]
    spread = None
    if len(values) > 1:  # of values that are not finite there is none
        spread = stdev(values) if all(map(isfinite, values)) else nan
    return {
        'name': picked[0][0],
        'mean': mean(values),
        'std': spread,
        'values': values,
    }


def comparison_cells(
    rows: Sequence[Mapping[str, Any]], planned: Mapping[tuple[str, str], int]
) -> list[list[str]]:
    """Format the rows of `summarize`, with costs also as a share of the first row's.

    Args:
        rows: The rows; the first one is the baseline's.
        planned: How many runs there should be, by variant and target.

    Returns:
        The header, then one list of cells per row. There is a column of targets if
        several were asked for, and one of runs if some were repeated or have failed.
    """
    first = rows[0]
    several = len({target for _, target in planned if target}) > 1
    counts = [len(row['seeds']) for row in rows[1:]]
    counted = any(n > 1 for n in counts) or sum(counts) < sum(planned.values())
    sized, sizes = size_cells(rows)
    tests = list(first['also'])
    metric = first['metric']['name']
    header = ['model', *(['target'] if several else []), metric]
    header += [f'{metric}, {name}' for name in tests]
    cells = [[*header, *sized, *(['runs'] if counted else [])]]
    for row, size in zip(rows, sizes, strict=True):
        spreads = [row['metric'], *(row['also'][name] for name in tests)]
        count = planned.get((row['model'], row['target']), 1)
        cells.append(
            [
                row['model'],
                *([row['target']] if several else []),
                *(spread_text(spread) for spread in spreads),
                *size,
                *([f'{len(row["seeds"])} of {count}'] if counted else []),
            ]
        )
    shown = {(row['model'], row['target']) for row in rows}
    blank = [''] * (1 + len(tests) + len(sized))
    for model, target in (key for key in planned if key not in shown):
        count = planned[model, target]
        cells.append(
            [model, *([target] if several else []), *blank, f'0 of {count}, failed']
        )
    return cells


def spread_text(spread: Mapping[str, Any]) -> str:
    """Return a mean with the standard deviation beside it.

    Examples:
        >>> spread_text(dict(mean=90.125, std=0.25))
        '90.12 ± 0.25'
        >>> spread_text(dict(mean=90.125, std=None))
        '90.12'
    """
    text = f'{spread["mean"]:.2f}'
    return text if spread['std'] is None else f'{text} ± {spread["std"]:.2f}'


def values_by_seed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each row of `summarize` that has several seeds.

    Examples:
        >>> values_by_seed([dict(model='M', target='flops=0.5', seeds=[0, 2],
        ...                      metric=dict(values=[57.125, 58]))])
        ['M, flops=0.5, seeds 0, 2: 57.12, 58.00']
    """
    return [
        f'{", ".join(filter(None, (row["model"], row["target"])))}, '
        f'seeds {", ".join(map(str, row["seeds"]))}: '
        f'{", ".join(f"{value:.2f}" for value in row["metric"]["values"])}'
        for row in rows
        if len(row['seeds']) > 1
    ]


def commits_of(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the commits of mmgfp that results come from; None where none is known.

    Examples:
        >>> commits_of([dict(commits=['a1', 'unknown']), dict(commits=['a1', 'b2'])])
        'a1, unknown, b2'
    """
    commits = list(dict.fromkeys(c for result in results for c in result['commits']))
    return None if commits == ['unknown'] else ', '.join(commits)


def without_nan(node: Any) -> Any:
    """Return nested data with None for NaN, which JSON does not know.

    Examples:
        >>> without_nan([dict(mean=nan, values=(1.5, nan))])
        [{'mean': None, 'values': [1.5, None]}]
    """
    if isinstance(node, Mapping):
        return {key: without_nan(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_nan(value) for value in node]
    return None if isinstance(node, float) and isnan(node) else node


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Return what to plot: the metric against each cost and time, in percent.

    Args:
        rows: The rows of `summarize`, the baseline's first.

    Returns:
        By the label of the axis and by variant, points (x, mean, spread) in the order
        of x; x is a share of the baseline's.
    """
    first = rows[0]
    axes: dict[str, Any] = {
        COSTS[name].label: lambda row, n=name: row[n] / first[n]
        for name in ('macs', 'memory')
        if first.get(name)
    }
    for key, runtime in RUNTIMES.items():
        for batch in first.get(key, {}):
            label = f'time in {runtime}' + ('' if batch == '1' else f', batch {batch}')
            axes[label] = lambda row, k=key, n=batch: (
                row[k][n] / first[k][n] if n in row.get(k, {}) else None
            )
    curves: dict[str, dict[str, list[Any]]] = {}
    for label, share in axes.items():
        by_variant = curves.setdefault(label, {})
        for row in rows:
            if (x := share(row)) is not None:
                point = (x * 100, row['metric']['mean'], row['metric']['std'] or 0.0)
                by_variant.setdefault(row['model'], []).append(point)
        for points in by_variant.values():
            points.sort()
    return curves
