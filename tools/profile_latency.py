"""Measure how long the layers of a config's model take at any widths in a runtime.

The file that it writes makes latency a cost: `latency_profile='table.json'` with
`target=dict(latency=0.5)` or `normalize='latency'` (docs/latency.md). It is measured
once, on the machine that the model is for; pruning may run on another one.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmgfp.apps.cli import (
    Overrides,
    add_shape_argument,
    build_from,
    load_config,
    run_cli,
    whole_number,
)
from mmgfp.apps.input_shape import profiled_shape
from mmgfp.apps.run_config import pruning_config
from mmgfp.apps.shown_steps import shown_steps
from mmgfp.engine.demo_batch import demo_calls, image_channels
from mmgfp.engine.model_building import init_weights
from mmgfp.latency.check import Check
from mmgfp.latency.cuts import ALIGNED
from mmgfp.latency.measure import LatencyProfiler
from mmgfp.latency.timers import TIMERS
from mmgfp.pruner import ChannelPruner
from mmgfp.utils.io import check_folder


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config file, or library::file')
    parser.add_argument('--out', required=True, type=Path, help='the file to write')
    parser.add_argument(
        '--runtime', default='onnxruntime', choices=TIMERS.names(), help='where it runs'
    )
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--batch', default=1, type=whole_number(1), help='images')
    parser.add_argument('--threads', default=1, type=whole_number(1))
    add_shape_argument(
        parser,
        'image that is measured, and counted when the model is pruned; by default that '
        "of the config's pruning hook, else that of its test pipeline, else 3 800 1280 "
        'for detectors and 3 224 224 for classifiers',
    )
    parser.add_argument(
        '--cuts',
        default=25,
        type=whole_number(8),
        help='random widths of the whole model that are measured',
    )
    parser.add_argument(
        '--check',
        default=0,
        type=whole_number(0),
        metavar='N',
        help='then measure N further ones and compare them with what is predicted',
    )
    parser.add_argument(
        '--check-multiple',
        default=ALIGNED,
        type=whole_number(1),
        metavar='M',
        help='what the widths of these are multiples of',
    )
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args()


def profiler_from(args: argparse.Namespace) -> LatencyProfiler:
    """Find the groups of the config's model, and prepare to measure it.

    Raises:
        ConfigError: If an argument is not valid, or ``--out`` holds another profile.
        TraceError: If nothing can be pruned.
    """
    timer = TIMERS[args.runtime](args.threads, args.device)
    cfg = load_config(args.config, args.cfg_options)
    torch.set_num_threads(args.threads)
    model = build_from(cfg)
    init_weights(model)
    calls = demo_calls(cfg, model)
    options = pruning_config(cfg, profiled=False)
    channels = image_channels(cfg, model)
    shape, source = profiled_shape(args.input_shape, options.input_shape, cfg, channels)
    print(f'image {tuple(shape)}, {source}', flush=True)
    profiles = calls.profile(model, shape)
    pruner = ChannelPruner(model, options)
    found = pruner.discover(calls.loss, calls.forward, calls.images, profiles)
    return LatencyProfiler(
        model.eval(),
        found.grouping,
        found.profiles,
        timer,
        shape,
        args.out,
        args.batch,
        notify=partial(print, flush=True),
    )


def show(checks: list[Check], console: Console) -> None:
    """Print what was predicted beside what was measured."""
    columns = ('MACs', 'predicted (ms)', 'measured (ms)', 'error', 'error of the share')
    table = Table(*columns)
    for check in checks:
        times = (f'{t:.4g}' for t in (check.predicted, check.measured))
        errors = (f'{e:+.1%}' for e in (check.error, check.ratio_error))
        table.add_row(f'{check.macs:.1%}', *times, *errors)
    console.print(table)
    cuts = checks[1:]  # the first one is the whole model
    _summarize('error', [c.error for c in cuts], console)
    _summarize('error of the share', [c.ratio_error for c in cuts], console)


def _summarize(name: str, errors: list[float], console: Console) -> None:
    sizes = [abs(error) for error in errors]
    middle, most = statistics.median(sizes), max(sizes)
    console.print(f'{name}: median {middle:.1%}, largest {most:.1%}')


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    check_folder(args.out.parent)
    console = Console(highlight=False)
    with shown_steps():
        profiler = profiler_from(args)
        profile = profiler.measure(args.cuts)
    console.print(f'wrote {args.out}: {profile.runtime}')
    if args.check:
        with shown_steps():
            checks = profiler.check(profile, args.check, args.check_multiple)
        show(checks, console)


if __name__ == '__main__':
    run_cli(main)
