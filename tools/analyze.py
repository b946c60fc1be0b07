"""Show a model's costs, its coupled channels, and which layers stay and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import load_checkpoint
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmgfp.apps.analysis import report
from mmgfp.apps.cli import (
    Overrides,
    add_shape_argument,
    build_from,
    check_checkpoint,
    load_config,
    run_cli,
    write_json,
)
from mmgfp.apps.input_shape import profiled_shape
from mmgfp.apps.run_config import pruning_config, pruning_hook
from mmgfp.apps.shown_steps import shown_steps
from mmgfp.config import PruningConfig
from mmgfp.discovery.dead import parameters_without_gradient
from mmgfp.engine.demo_batch import demo_calls, image_channels
from mmgfp.pruner import ChannelPruner
from mmgfp.selection.costs import COSTS
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.units import UnitState
from mmgfp.utils.io import check_folder


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config file, or library::file')
    parser.add_argument('checkpoint', nargs='?', help='weights to load first')
    add_shape_argument(
        parser,
        "image for which costs are counted; default: that of the config's pruning "
        'hook or the latency profile, else its size in testing, or, where the config '
        "names none, the library's default",
    )
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    parser.add_argument(
        '--latency-profile',
        metavar='FILE',
        help='predict latency by this file of tools/profile_latency.py',
    )
    parser.add_argument(
        '--no-latency',
        action='store_true',
        help="leave out what needs the hook's latency profile, before it is measured",
    )
    parser.add_argument('--json', metavar='FILE', help='write the numbers to this file')
    parser.add_argument(
        '--strict', action='store_true', help='fail where channels cannot be followed'
    )
    return parser.parse_args()


def analyze(
    cfg: Config,
    checkpoint: str | None,
    shape: Sequence[int] | None,
    strict: bool,
    latency: str | None = None,
    profiled: bool = True,
) -> dict[str, Any]:
    """Trace the config's model on a synthetic batch and report on it.

    A pruning hook in the config says what it would keep, and by which criterion.

    Raises:
        ConfigError: If the checkpoint is missing or an option of the hook is not valid.
        TraceError: If nothing can be pruned.
    """
    model = build_from(cfg)
    if checkpoint is not None:
        check_checkpoint('checkpoint', checkpoint)
        load_checkpoint(model, checkpoint, map_location='cpu')
    calls = demo_calls(cfg, model)
    options = pruning_config(cfg, profiled)
    if latency := latency or options.latency_profile:
        sized = {'input_shape': shape, 'latency_profile': latency}
        options = PruningConfig.of(options, **sized)
    channels = image_channels(cfg, model)
    size, source = profiled_shape(shape, options.input_shape, cfg, channels)
    if latency and shape is None:
        source = f'as {latency} says'
    profiles = calls.profile(model, size)
    pruner = ChannelPruner(model, options, strict=strict or options.strict)
    # Not prepared: what can be pruned is of interest even if it's not enough.
    found = pruner.discover(calls.loss, calls.forward, calls.images, profiles)
    facts = (found.grouping, found.profiles)
    units = UnitState(model, *facts, costs=options.costs)
    sizes = {'input_shape': list(size), 'input_shape_from': source}
    is_asked = profiled and pruning_hook(cfg) is not None
    unread: set[str] = set()
    if pruner.criterion.needs_gradients:
        unread = parameters_without_gradient(model, calls.loss)
    return report(units, profiles, options, is_asked, unread) | sizes


def show(result: dict[str, Any], console: Console) -> None:
    """Print the report as tables."""
    groups = Table('made by', 'units', 'members', title='Coupled channels')
    for group in result['groups']:
        layers = list(dict.fromkeys(n.rpartition('.')[0] for n, _ in group['members']))
        others = [layer for layer in layers if layer != group['name']]
        more = f' and {len(others) - 4} more' if len(others) > 4 else ''
        groups.add_row(group['name'], str(group['units']), ', '.join(others[:4]) + more)
    frozen = Table('layer', 'reason', title='Layers that keep output channels')
    for layer in result['frozen']:
        frozen.add_row(layer['layer'], layer['reason'])
    console.print(groups)
    console.print(frozen)
    if narrow := NarrowGroups(**result['narrow']).text:
        console.print(narrow)
    if unscored := result['unscored']:
        console.print(
            f'the loss does not depend on {", ".join(unscored)}: without a score these '
            'groups stay (dead branches go when the model is deployed)'
        )
    console.print(
        f'{sum(g["units"] for g in result["groups"])} units in '
        f'{len(result["groups"])} groups; prunable: '
        f'{result["coverage"]["channels"]:.1%} of output channels, '
        f'{result["coverage"]["macs"]:.1%} of MACs'
    )
    costs = {name: COSTS[name] for name in COSTS.names() if name in result}
    least = (f'{costs[n].label} {share:.1%}' for n, share in result['least'].items())
    limits = ', '.join(result['limited_by'])
    line = f'the smallest model allowed ({limits}) has {", ".join(least)}'
    console.print(escape(line))
    amounts = (
        f'{cost.label} {amount} {cost.unit}'
        for name, cost in costs.items()
        for amount in [f'{result[name] / cost.scale:#.4g}'.rstrip('.')]
    )
    size = 'x'.join(map(str, result['input_shape']))
    source = result['input_shape_from']
    console.print(', '.join(amounts), f'for one {size} image, {source}')
    console.print(
        'one multiply-add counts as one; of a two-stage detector, RoIs are those of '
        'training'
    )
    if 'latency' in result:
        console.print(f'latency is predicted for {result["latency_profile"]}')
    if refused := result.get('refused'):
        console.print(f'[bold]pruning would be refused:[/bold] {escape(refused)}')


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    if args.json:
        check_folder(Path(args.json).parent)
    given = (args.checkpoint, args.input_shape, args.strict)
    latency = (args.latency_profile, not args.no_latency)
    with shown_steps():
        result = analyze(cfg, *given, *latency)
    # Where lines are read by others, names are not to be cut.
    show(result, Console(width=None if sys.stdout.isatty() else 200))
    if args.json:
        write_json(args.json, result)


if __name__ == '__main__':
    run_cli(main)
