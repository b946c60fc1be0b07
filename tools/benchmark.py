"""Time models and model files side by side, in PyTorch and in other runtimes.

All of them take turns in one process; each turn times a second run. Times are wall
clock and the processor time of the process (of all its threads), as medians with
quartiles, and ratios are medians of those of each round to the first model in the same
runtime at the same batch: name the baseline first. After few rounds they need not be
the ratios of the medians. Progress goes to the error stream.
Models of configs give raw outputs, of two-stage detectors those of the RPN, in every
runtime; --outputs end-to-end includes boxes, NMS and RoI heads.

Memory is the high-water mark of resident memory (VmHWM, Linux) of a process in which
one model runs alone; growth leaves out what the libraries hold before it is opened.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from mmgfp.apps.benchmark import fixed_size, measure_batch, subjects_of, time_table
from mmgfp.apps.cli import (
    add_shape_argument,
    load_config,
    run_cli,
    whole_number,
    write_json,
)
from mmgfp.apps.input_shape import default_input_shape, size_in_testing
from mmgfp.apps.subjects import EAGER, GRAPHS, is_file, resolve, split_source
from mmgfp.apps.tables import machine_facts
from mmgfp.engine.demo_batch import image_channels
from mmgfp.runtimes import RUNTIMES
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.words import counted


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models',
        nargs='+',
        help='CONFIG:CHECKPOINT, a deployed folder, or a .onnx, .xml or .pt file',
    )
    parser.add_argument(
        '--runtime',
        nargs='+',
        choices=[EAGER, *RUNTIMES.names()],
        default=[EAGER, 'onnxruntime'],
        help='models of configs are exported for those but torch',
    )
    parser.add_argument(
        '--batch', nargs='+', type=whole_number(1), default=[1], metavar='N'
    )
    parser.add_argument('--threads', type=whole_number(1), default=1)
    parser.add_argument('--rounds', type=whole_number(1), default=20)
    parser.add_argument('--outputs', choices=list(GRAPHS), default='raw')
    parser.add_argument(
        '--no-memory', action='store_true', help='measure no memory, which takes time'
    )
    add_shape_argument(
        parser, 'image; by default what a file fixes, or the first config tests on'
    )
    parser.add_argument('--json', type=Path, help='write all numbers to this file')
    return parser.parse_args()


def choose_shape(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the size (C, H, W) of images.

    Raises:
        ConfigError: If neither the user nor a file or config tells it.
    """
    if args.input_shape:
        return tuple(args.input_shape)
    sources = [resolve(source) for source in args.models]
    for source in sources:
        size = fixed_size(source, args.runtime)
        if size is not None and None not in size[1:]:
            return tuple(side for side in size[1:] if side is not None)
    for source in sources:
        if not is_file(source):
            cfg = load_config(split_source(source)[0])
            size = size_in_testing(cfg)
            return (image_channels(cfg), *size) if size else default_input_shape(cfg)
    got = 'files with free sizes'
    raise ConfigError('--input-shape', 'given', got, 'add --input-shape C H W')


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    shape = choose_shape(args)
    print(f'images of {shape}, {counted(args.threads, "thread")}, {args.rounds} rounds')
    for source in args.models:
        resolved = resolve(source)
        if not is_file(resolved) and split_source(resolved)[1] is None:
            print(f'{source} has random weights: no CONFIG:CHECKPOINT is named')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batch:
            subjects, notes = subjects_of(
                args.models,
                args.runtime,
                (batch, *shape),
                args.outputs,
                args.threads,
                Path(folder),
            )
            found, more = measure_batch(subjects, args.rounds, not args.no_memory)
            print(*notes, *more, sep='\n', end='\n' if notes or more else '')
            rows += found
    if not rows:
        remedy = 'see the lines above'
        raise ConfigError('models', 'measured in at least one runtime', 'none', remedy)
    Console(width=max(80, Console().width)).print(time_table(rows))
    if args.json:
        facts = {**machine_facts(), 'threads': args.threads, 'rounds': args.rounds}
        facts |= {'input_shape': list(shape), 'outputs': args.outputs}
        write_json(args.json, {'rows': rows, **facts})


if __name__ == '__main__':
    run_cli(main)
