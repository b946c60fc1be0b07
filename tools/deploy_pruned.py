"""Turn a pruned checkpoint into a folder: weights, config, structure, summary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from mmgfp.apps.analysis import (
    costs_of,
    counted_costs,
    is_predicted,
    without_predictions,
)
from mmgfp.apps.cli import (
    Overrides,
    add_shape_argument,
    load_config,
    reading_config,
    run_cli,
    whole_number,
    write_json,
)
from mmgfp.apps.dead_branches import lines_of, without_dead_branches
from mmgfp.apps.exporting import (
    add_export_arguments,
    check_export,
    export,
    print_exported,
    reports,
)
from mmgfp.apps.input_shape import deployed_shape
from mmgfp.apps.latency import measure_runtimes
from mmgfp.apps.shown_steps import shown_steps
from mmgfp.discovery.dead import DeadBranches
from mmgfp.engine.demo_batch import demo_calls
from mmgfp.engine.deploy import (
    Deployable,
    check_destination,
    deploy,
    read_deployable,
    recorded_shape,
)
from mmgfp.report.quantities import PROCESSOR, quantities_of, ratio_key
from mmgfp.utils.words import counted


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the pruning or fine-tuning run')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='folder to write')
    parser.add_argument('--name', help="name of the files; the checkpoint's by default")
    add_shape_argument(
        parser, 'image for costs and latency; that of the pruning run by default'
    )
    parser.add_argument(
        '--rounds',
        type=whole_number(0),
        default=10,
        help='timed passes, in which the models take turns; 0 measures no latency',
    )
    parser.add_argument(
        '--dead-branches',
        choices=('remove', 'keep'),
        default='remove',
        help='what becomes of modules that run although nothing reads their output',
    )
    add_export_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args()


def summarize(
    cfg: Config, item: Deployable, shape: Sequence[int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure costs, and latency at batch 1 on the CPU, before and after pruning.

    Args:
        cfg: The config that the checkpoint belongs to.
        item: The original and the compact model.
        shape: Size (C, H, W) of the image.
        rounds: Timed passes; 0 measures no latency.

    Returns:
        Costs by their names in `COSTS` and, if measured, median milliseconds and
        ratios by the keys of `measure_runtimes`, of `original` and `pruned`; after a
        run with a latency profile also the `predicted_latency_ms`.
    """
    models = {'original': item.original, 'pruned': item.model}
    calls = demo_calls(cfg, item.original)
    rows: dict[str, dict[str, Any]] = {
        name: costs_of(model, calls.profile(model, shape))
        for name, model in models.items()
    }
    if latency := item.meta.get('costs', {}).get('latency'):
        now, ratio = latency['remaining'], latency['ratio']
        for name, value in (('original', now / ratio), ('pruned', now)):
            rows[name]['predicted_latency_ms'] = value
            rows[name]['latency_profile'] = item.meta.get('latency_profile')
    if rounds:
        infer = calls.inference(item.original, shape)
        times, reason = measure_runtimes(models, infer, (1, *shape), rounds)
        if reason:
            print(reason)
        for name, row in rows.items():
            row.update({key: times[key][name] for key in times})
    return rows


def without_stale_predictions(
    item: Deployable, shape: Sequence[int], is_whole: bool
) -> Deployable:
    """Return a model whose file does not name a latency of another one; say so.

    Args:
        item: The model.
        shape: Size (C, H, W) of the image.
        is_whole: Whether the model is still the one that the pruning run had.
    """
    costs = item.meta.get('costs') or {}
    is_same = is_whole and list(shape) == list(recorded_shape(item.meta) or shape)
    if is_same or not any(map(is_predicted, costs)):
        return item
    what = 'another image size' if is_whole else 'the model with all branches'
    print(f'the latency that the pruning run predicted is of {what}: left out')
    return replace(item, meta={**item.meta, 'costs': without_predictions(costs)})


def described(
    item: Deployable, shape: Sequence[int], rows: dict[str, dict[str, Any]]
) -> Deployable:
    """Return a model whose file tells the image size and the costs at that size.

    Whoever deploys or fine-tunes the result counts at the same size. Those of the
    pruning run may be of another one, and with branches that nothing reads.

    Args:
        item: The model.
        shape: Size (C, H, W) of the image.
        rows: What `summarize` returns.
    """
    meta = {**item.meta, 'input_shape': list(shape)}
    if costs := meta.get('costs'):  # not of fine-tuning, which knows none
        counted = counted_costs(rows['original'], rows['pruned'])
        meta['costs'] = {**costs, **counted}
    return replace(item, meta=meta)


def show(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Print original and pruned side by side, with the ratio."""
    table = Table('', 'original', 'pruned', 'ratio')
    after = quantities_of(rows['pruned'])
    for quantity, value in quantities_of(rows['original']).items():
        ratio = rows['pruned'].get(ratio_key(quantity.key), after[quantity] / value)
        cells = quantity.text(value), quantity.text(after[quantity]), f'{ratio:.1%}'
        table.add_row(f'{quantity.label} ({quantity.unit})', *cells)
    console.print(table)
    if any(key in rows['original'] for key in PROCESSOR):
        threads = counted(torch.get_num_threads(), 'thread')
        print(
            f'latency: medians of rounds in turn with {threads}; on a busy machine go '
            'by processor time (of all threads) and by their ratios, medians of each '
            "round's: after few rounds, they need not be the ratios of the medians"
        )


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    name = Path(args.checkpoint).stem if args.name is None else args.name
    check_destination(args.out, name)
    check_export(args)
    with reading_config(cfg):
        item = read_deployable(cfg, args.checkpoint)
    if gone := item.structure.identities:
        print(f'the checkpoint is without {", ".join(gone)}')
    dead = DeadBranches()
    if args.dead_branches == 'remove':
        item, dead = without_dead_branches(cfg, item)
        for line in lines_of(dead):
            print(line)
    shape, source = deployed_shape(args.input_shape, item, cfg)
    print(f'costs are counted for an image of {tuple(shape)}, {source}')
    item = without_stale_predictions(item, shape, not dead.names)
    # Before anything is written, so that a model that does not run leaves no folder.
    with shown_steps():
        rows = summarize(cfg, item, shape, args.rounds)
        item = described(item, shape, rows)
        exported = export(cfg, item, shape, args.out, name, args)
    paths = deploy(cfg, item, args.out, name)
    summary = {'input_shape': list(shape), **rows, **reports(exported)}
    if gone := item.structure.identities:
        summary['gone'] = list(gone)
    sparsity = item.meta.get('sparsity')
    if isinstance(sparsity, dict) and isinstance(sparsity.get('density'), float):
        summary['sparsity'] = sparsity
        print(f'{sparsity["density"]:.2%} of the weights that could go are left')
    paths['summary'] = args.out / 'summary.json'
    write_json(paths['summary'], summary)
    show(rows, Console())
    if 'onnxruntime_ms' in rows['original'] and hasattr(item.original, 'roi_head'):
        print('in onnxruntime, a two-stage detector runs up to its RoIs, without heads')
    print_exported(exported, args)
    print(f'wrote {", ".join(str(p) for p in paths.values())}')


if __name__ == '__main__':
    run_cli(main)
