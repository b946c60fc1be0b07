"""A comparison from its settings to its table, its curves and its JSON."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmgfp.apps.cli import write_json
from mmgfp.apps.compare.latency import measure_all
from mmgfp.apps.compare.results import (
    commits_of,
    comparison_cells,
    curves_of,
    summarize,
    values_by_seed,
    without_nan,
)
from mmgfp.apps.compare.runs import Result, RunExecutor, run_all
from mmgfp.apps.compare.settings import Comparison
from mmgfp.apps.compare.variants import Run, Variant
from mmgfp.apps.plots import plot_curves
from mmgfp.apps.processes import working_alone
from mmgfp.apps.tables import machine_facts, markdown, print_table
from mmgfp.report.quantities import main_metric
from mmgfp.utils.io import atomic_write
from mmgfp.utils.validation import check


def compare(
    comparison: Comparison, tools: Path, work_dir: Path, jobs: int = 1
) -> tuple[list[Result], dict[str, str]]:
    """Run what has not run yet, time all models, and write the results.

    Args:
        comparison: What is compared.
        tools: The folder of the tools.
        work_dir: Gets ``results.md``, ``results.json`` and ``curves.svg``, beside
            folders of the runs.
        jobs: How many run at a time, with one thread each if there are several.

    Returns:
        The results, the baseline's first, and the reasons of runs that have none.

    Raises:
        MMGFPError: If the settings are wrong, or there is no baseline.
    """
    comparison.check_configs()
    threads = 1 if jobs > 1 else None
    if threads:
        torch.set_num_threads(threads)
    with working_alone(work_dir, threads) as processes:
        execute = RunExecutor(comparison, tools, work_dir, processes)

        baseline = execute.baseline()
        metric, value = main_metric(baseline['metrics'], comparison.metric)
        print(f'baseline: {metric} {value:.2f}', flush=True)

        def describe(result: Result) -> str:
            name, value = main_metric(result['metrics'], comparison.metric)
            check('metric', name == metric, f"the baseline's, {metric}", name)
            return f'{name} {value:.2f}'

        runs = comparison.runs
        found, failures = run_all(runs, execute, jobs, processes, describe)
        results = [{**baseline, 'run': 'baseline'}, *found]
        latency = measure_all(
            {r['run']: f'{r["config"]}:{r["checkpoint"]}' for r in results},
            execute.shape,
            comparison.batches,
            comparison.latency_rounds,
            work_dir / 'latency.json',
        )
        write_report(comparison, work_dir, results, failures, latency, execute.shape)
    return results, failures


def write_report(
    comparison: Comparison,
    work_dir: Path,
    results: Sequence[Result],
    failures: Mapping[str, str],
    latency: Mapping[str, Any],
    shape: Sequence[int],
) -> None:
    """Write the table, the curves and all numbers; print the table.

    Args:
        comparison: What was compared.
        work_dir: Where to write.
        results: Results of runs, the baseline's first.
        failures: Reasons of runs without a result.
        latency: What `measure_all` returns.
        shape: Size (C, H, W) of the image of costs and times.
    """
    rows = summarize(results, comparison.metric, latency['times'])
    runs = comparison.runs
    cells = comparison_cells(rows, _planned(runs))
    facts = {
        'configs': [comparison.baseline, comparison.prune, comparison.finetune],
        'seed': ', '.join(dict.fromkeys(_seed_text(run.seed) for run in runs)),
        'seconds': _seconds_of(results),
        'command': command_of(sys.argv),
        **machine_facts(),
        'commit': commits_of(results),
        'threads': latency['threads'],
        'input_shape': list(shape),
        'two_stage': comparison.baseline_config().model.get('roi_head') is not None,
        'notes': [
            *_given_notes(comparison),
            *settings_notes(comparison.variants),
            *_run_notes(runs, failures),
            *values_by_seed(rows),
            *latency['notes'],
        ],
    }
    text = markdown(cells, facts)
    report = {'rows': rows, 'runs': list(results), 'failures': dict(failures)}
    report['latency'] = latency.get('rows', [])
    write_json(work_dir / 'results.json', without_nan({**report, **facts}))
    atomic_write(work_dir / 'results.md', lambda tmp: tmp.write_text(text))
    metric = rows[0]['metric']['name']
    plot_curves(curves_of(rows), metric, work_dir / 'curves.svg')
    print_table(cells)
    for name, reason in failures.items():
        print(f'failed: {name}: {reason}')


def command_of(words: Sequence[str]) -> str:
    """Return what to type for a command, of which the first word is the program.

    Examples:
        >>> command_of(['compare.py', 'a b.py']), command_of(['mmgfp compare', 'a'])
        ("python compare.py 'a b.py'", 'mmgfp compare a')
    """
    program, *others = words
    is_script = program.endswith('.py')
    start = f'python {shlex.quote(program)}' if is_script else program
    return ' '.join([start, *map(shlex.quote, others)])


def _given_notes(comparison: Comparison) -> list[str]:
    """Return lines on the baseline's weights, and on entries of all configs."""
    weights = comparison.checkpoint or 'trained here'
    options = [f'{key}={value}' for key, value in comparison.options.items()]
    also = [f'{name}: {" ".join(test)}' for name, test in comparison.also.items()]
    return [
        f'baseline: `{weights}`',
        *([f'all configs: `{", ".join(options)}`'] if options else []),
        *([f'further tests: `{"; ".join(also)}`'] if also else []),
    ]


def _seconds_of(results: Sequence[Result]) -> dict[str, int]:
    """Return the wall-clock seconds of all runs of each variant."""
    seconds: dict[str, int] = {}
    for result in results:
        spent = sum(result['seconds'].values()) + result.get('prune_seconds', 0)
        seconds[result['variant']] = seconds.get(result['variant'], 0) + spent
    return seconds


def _planned(runs: Sequence[Run]) -> dict[tuple[str, str], int]:
    planned: dict[tuple[str, str], int] = {}
    for run in runs:
        key = run.variant.name, run.target_text
        planned[key] = planned.get(key, 0) + 1
    return planned


def _seed_text(seed: int | None) -> str:
    return 'of the configs' if seed is None else str(seed)


def settings_notes(variants: Sequence[Variant]) -> list[str]:
    """Return a line on what all pruned variants share, and one on each variant."""
    settings = {variant.name: _settings_of(variant) for variant in variants}
    pruned = [settings[variant.name] for variant in variants if variant.is_pruned]
    shared = [
        text
        for text in (pruned[0] if len(pruned) > 1 else [])
        if all(text in others for others in pruned)
    ]
    notes = [f'all that are pruned: `{", ".join(shared)}`'] if shared else []
    for name, texts in settings.items():
        own = [text for text in texts if text not in shared]
        nothing = 'nothing else' if shared else 'as configured'
        notes.append(f'{name}: `{", ".join(own)}`' if own else f'{name}: {nothing}')
    return notes


def _settings_of(variant: Variant) -> list[str]:
    """Return the settings of the hook, then entries of other configs, as texts."""
    texts = [f'{key}={value}' for key, value in variant.pruning.items()]
    texts += [f'config={variant.config}'] if variant.config else []
    texts += [f'targets={variant.targets}'] if variant.targets else []
    for stage in ('prune', 'finetune', 'train'):
        entries = getattr(variant, stage) or {}
        texts += [f'{stage}: {key}={value}' for key, value in entries.items()]
    return texts


def _run_notes(runs: Sequence[Run], failures: Mapping[str, str]) -> list[str]:
    """Return lines on targets, spreads and failures."""
    targets = dict.fromkeys(run.target_text for run in runs if run.target_text)
    notes = [f'targets: {", ".join(targets) or "none"}']
    if len({run.seed for run in runs}) > 1:
        notes.append(
            'means over seeds ± sample standard deviation; all start from the same '
            'baseline'
        )
    return notes + [
        f'**failed**: {name}: {reason}' for name, reason in failures.items()
    ]
