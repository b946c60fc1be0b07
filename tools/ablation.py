"""Prune one model in several ways to the same target, and compare the results.

Each variant changes settings of the pruning hook; all start from the same weights
and are fine-tuned by the same config. Without --variant they are the four of the
paper: -M, -F and -U by what the importance is divided by, and -I, which leaves
coupled channels alone. Every stage runs in a process of its own, and a finished stage
is not run again, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmgfp.apps.cli import load_config, run_cli
from mmgfp.apps.comparison import draw, measure, write_results
from mmgfp.apps.pipeline import Pipeline
from mmgfp.apps.stages import (
    add_arguments,
    check_arguments,
    find_hook,
    input_shape,
    original,
    parse_options,
    prune_and_finetune,
)
from mmgfp.utils.errors import ConfigError

TOOLS = Path(__file__).resolve().parent

#: Settings of the hook by variant (paper, section 5), which knows no alignment.
PAPER = {
    'M': ['normalize=memory', 'divisor=1'],
    'F': ['normalize=flops', 'divisor=1'],
    'U': ['normalize=none', 'divisor=1'],
    'I': ['normalize=memory', 'divisor=1', 'coupled=False'],
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        '--variant',
        nargs='+',
        action='append',
        default=[],
        metavar=('NAME', 'KEY=VALUE'),
        help='a variant and its settings of the pruning hook, such as '
        '"slow interval=50"; repeat it for each variant. One of the paper\'s names '
        '(M, F, U, I) alone stands for its settings',
    )
    parser.add_argument(
        '--also',
        nargs='+',
        action='append',
        default=[],
        metavar=('NAME', 'KEY=VALUE'),
        help='one more test of every model, under these config entries',
    )
    return parser.parse_args(argv)


def variants_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the settings of the hook by variant, in order.

    Raises:
        ConfigError: If a variant has no settings or comes twice.
    """
    if not args.variant:
        return PAPER
    variants: dict[str, list[str]] = {}
    for name, *settings in args.variant:
        settings = settings or PAPER.get(name, [])
        if not settings or name in variants:
            got = 'the name twice' if settings else 'none'
            raise ConfigError(
                f'--variant {name} must have settings of the pruning hook and a name '
                f'of its own (got {got}); give NAME KEY=VALUE, or one of '
                f'{", ".join(PAPER)}'
            )
        parse_options(settings)  # refuses what has no value
        variants[name] = settings
    return variants


def hook_options(index: int, settings: Sequence[str]) -> list[str]:
    """Turn settings of the hook at an index of `custom_hooks` into config overrides."""
    return [f'custom_hooks.{index}.{setting}' for setting in settings]


def main() -> None:
    """Run every stage, measure, write the results."""
    args = parse_args()
    variants = variants_of(args)
    pipeline = Pipeline(TOOLS, args.work_dir, args.cfg_options)
    check_arguments(args)
    shape = input_shape(args.prune, args.cfg_options)
    baseline = original(pipeline, args.baseline, args.checkpoint)
    index, _ = find_hook(load_config(args.prune, parse_options(args.cfg_options)))
    candidates, pruned = [baseline], {}
    for name, settings in variants.items():
        options = hook_options(index, settings)
        stages = prune_and_finetune(pipeline, args, baseline, f'_{name}', options)
        pruned[name] = stages[0].checkpoint
        candidates.append(replace(stages[1], name=name))
    also = {name: options for name, *options in args.also}
    rows = measure(pipeline, candidates, shape, args, also)
    for name, checkpoint in pruned.items():
        picture = args.work_dir / f'channels_{name}.png'
        draw(baseline, args.cfg_options, checkpoint, picture)
    notes = {'variants': variants, 'also': also}
    write_results(pipeline, rows, shape, args, notes)
    print(f'in {args.work_dir}: results.md, results.json, channels_*.png')


if __name__ == '__main__':
    run_cli(main)
