"""Measure what a model loses where a share of one group of channels is pruned.

Each group alone is masked by its lowest-scored units, without any training, and the
model is tested on the validation set: a table, a map, and ratios for pruning by
`scope='local'`, the largest share of each group that costs at most --tolerance. What
was measured is not measured again, so the same command continues after an interruption.

CONFIG is one that prunes: its hook names the criterion and what may go.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmgfp.apps.cli import (
    Overrides,
    check_checkpoint,
    load_config,
    run_cli,
    whole_number,
    write_json,
)
from mmgfp.apps.plots import plot_losses
from mmgfp.apps.run_config import pruning_config
from mmgfp.apps.sensitivity import (
    Scan,
    ratios_by_name,
    scale_to_target,
    scan,
    score_units,
    tolerable_shares,
)
from mmgfp.apps.sensitivity_run import (
    Validation,
    report_lines,
    training_batches,
    validation_config,
    without_ratios,
)
from mmgfp.apps.tables import markdown_table, print_table
from mmgfp.config import PruningConfig
from mmgfp.discovery.discover import discover
from mmgfp.selection.scope import RATIOS_KEY
from mmgfp.selection.targets import Target, parse_targets
from mmgfp.units import UnitState
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import atomic_write, check_folder


def share(text: str) -> float:
    """Parse a share of a group."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'must be between 0 and 1 (got {text!r})')
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config that prunes the model')
    parser.add_argument('checkpoint', help='weights of the unpruned model')
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--shares', nargs='+', type=share, default=[0.25, 0.5, 0.75])
    parser.add_argument(
        '--batches',
        type=whole_number(1),
        default=10,
        help='training batches that units are scored by',
    )
    parser.add_argument(
        '--max-images', type=whole_number(1), help='test on so many images, not on all'
    )
    parser.add_argument('--metric', help="default: COCO's mAP or the top-1 accuracy")
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1.0,
        help='what pruning one group may cost, in the unit of the table',
    )
    parser.add_argument(
        '--target',
        nargs=1,
        action=Overrides,
        help='scale the ratios until a cost is met, such as flops=0.5',
    )
    parser.add_argument('--out', type=Path, help='default: WORK_DIR/ratios.json')
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args(argv)


def target_of(args: argparse.Namespace) -> Target | None:
    """Return the target of the command line."""
    return parse_targets(args.target)[0] if args.target else None


def prepared(
    args: argparse.Namespace, cfg: Any, options: PruningConfig, model: Any
) -> tuple[UnitState, np.ndarray]:
    """Find the groups of the model and score their units.

    Raises:
        ConfigError: If the work directory holds a scan with other settings.
    """
    criterion = options.build_criterion()
    calls = next(training_batches(cfg, model, 1))
    how = (options.keep, options.coupled, options.strict, criterion.unscorable)
    profiles = calls.profile(model, options.input_shape)
    batch = (calls.loss, calls.forward, calls.images, profiles)
    discovery = discover(model, *batch, *how)
    groups = [[g.name, g.units] for g in discovery.grouping.groups]
    settings: dict[str, Any] = {'config': args.config, 'checkpoint': args.checkpoint}
    settings |= {'cfg_options': repr(args.cfg_options), 'groups': groups}
    settings |= {name: getattr(args, name) for name in ('batches', 'max_images')}
    settings |= {'metric': args.metric, 'criterion': repr(options.criterion)}
    path = args.work_dir / 'scores.json'
    saved = json.loads(path.read_text()) if path.is_file() else None
    if saved is None:
        print(f'scoring {discovery.grouping.units} units by {args.batches} batches')
        batches: Any = training_batches(cfg, model, args.batches)
        scores = score_units(model, discovery, criterion, batches)
        saved = {'settings': settings, 'scores': scores.tolist()}
        write_json(path, saved)
    elif saved['settings'] != settings:
        changed = [k for k in settings if saved['settings'].get(k) != settings[k]]
        raise ConfigError(
            '--work-dir',
            'of a scan with the same settings',
            f'one with another {", ".join(changed)}',
            f'name another folder, or delete {args.work_dir}',
        )
    units = UnitState(
        model, discovery.grouping, discovery.profiles, costs=options.costs
    )
    return units, np.array(saved['scores'])


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    target = target_of(args)
    check_checkpoint('checkpoint', args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
    without_ratios(cfg)
    options = pruning_config(cfg)
    check_folder(args.work_dir)
    testing = validation_config(cfg, args.max_images, args.work_dir / 'logs')
    validation = Validation(testing, args.checkpoint, args.metric)
    units, scores = prepared(args, cfg, options, validation.model)
    lines = args.work_dir / 'scan.jsonl'
    shares = sorted(set(args.shares))
    found = scan(units, scores, shares, validation, lines)
    ratios = tolerable_shares(found.losses, len(units.sizes), args.tolerance)
    if target is not None:
        limits = units.limits(options, ())
        ratios = scale_to_target(ratios, units, limits, target)
    write(args, units, found, ratios)


def write(
    args: argparse.Namespace, units: UnitState, found: Scan, ratios: np.ndarray
) -> None:
    """Write the table, the map and the ratios."""
    shares = sorted(set(args.shares))
    names = [group.name for group in units.grouping.groups]
    table = [
        [found.losses.get(g, {}).get(s) for s in shares] for g in range(len(names))
    ]
    cells = report_lines(names, units.sizes.tolist(), table, shares, ratios.tolist())
    removed = np.floor(ratios * units.sizes + 1e-9)
    macs = units.costs.totals(removed).ratio('macs', units.full)
    target = target_of(args)
    scaled = f', scaled to {target.cost}={target.ratio:g}' if target else ''
    text = [
        *markdown_table(cells),
        '',
        f'Points of {found.metric} that the model loses, {found.full:.2f} as it is, '
        'where a share of',
        'one group is masked without any training; the ratio is what may go of it at a',
        f'tolerance of {args.tolerance:g}{scaled}.',
        f'With all ratios together {macs:.1%} of the MACs remain.',
    ]
    note = '\n'.join(text) + '\n'
    atomic_write(args.work_dir / 'results.md', lambda tmp: tmp.write_text(note))
    plot_losses(table, names, shares, found.metric, args.work_dir / 'sensitivity.svg')
    out = args.out or args.work_dir / 'ratios.json'
    write_json(out, {RATIOS_KEY: ratios_by_name(ratios, units)})
    print_table(cells)
    print(f'{macs:.1%} of the MACs remain with the ratios in {out}')
    print(f'in {args.work_dir}: results.md, sensitivity.svg, scan.jsonl')


if __name__ == '__main__':
    run_cli(main)
