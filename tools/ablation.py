"""Prune one model in several ways to the same target, and compare what comes out.

Each variant changes settings of the pruning hook; all start from the same weights
and are fine-tuned by the same config. Without --variant they are the four of the
paper: -M, -F and -U by what the importance is divided by, and -I, which leaves
coupled channels alone. Every stage is a process of its own and is not run again
once it has finished, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmgfp.apps.cli import load_config, run_cli
from mmgfp.apps.comparison import draw, measure, write_results
from mmgfp.apps.stages import (
    Candidate,
    Pipeline,
    add_arguments,
    find_hook,
    input_shape,
    last_checkpoint,
    original,
    parse_options,
    pruned_checkpoint,
)
from mmgfp.utils.errors import ConfigError

TOOLS = Path(__file__).resolve().parent

#: Settings of the hook by variant (paper, section 5).
PAPER = {
    'M': ['normalize=memory'],
    'F': ['normalize=flops'],
    'U': ['normalize=none'],
    'I': ['normalize=memory', 'coupled=False'],
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
        help='a variant and its settings of FisherPruningHook, such as '
        '"slow interval=50"; once for each. A name of the paper alone (M, F, U, I) '
        'stands for its settings',
    )
    parser.add_argument(
        '--also',
        nargs='+',
        action='append',
        default=[],
        metavar=('NAME', 'KEY=VALUE'),
        help='a further test of every model, under these config entries',
    )
    return parser.parse_args(argv)


def variants_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Settings of the hook by variant, in order.

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
                f'--variant {name} must have settings of FisherPruningHook and a name '
                f'of its own (got {got}); give NAME KEY=VALUE, or one of '
                f'{", ".join(PAPER)}'
            )
        variants[name] = settings
    return variants


def hook_options(place: int, settings: Sequence[str]) -> list[str]:
    """Writes settings of the hook at a place of `custom_hooks` as overrides."""
    return [f'custom_hooks.{place}.{setting}' for setting in settings]


def run_stages(
    pipeline: Pipeline,
    args: argparse.Namespace,
    baseline: Candidate,
    variants: Mapping[str, Sequence[str]],
) -> tuple[list[Candidate], dict[str, str]]:
    """Prunes and fine-tunes each variant.

    Returns:
        What is to be compared, and the pruned checkpoint of each by name.
    """
    place, _ = find_hook(load_config(args.prune, parse_options(args.cfg_options)))
    tuned, pruned = [], {}
    for name, settings in variants.items():
        options = [f'load_from={baseline.checkpoint}', *hook_options(place, settings)]
        folder = pipeline.train(f'prune_{name}', args.prune, options)
        pruned[name] = pruned_checkpoint(folder, args.prune)
        rebuild = (f'model.structure={pruned[name]}',)
        folder = pipeline.train(
            f'finetune_{name}', args.finetune, [f'load_from={pruned[name]}', *rebuild]
        )
        weights = last_checkpoint(folder)
        tuned.append(Candidate(name, args.finetune, weights, rebuild))
    return tuned, pruned


def main() -> None:
    """Runs every stage, measures, writes the results."""
    args = parse_args()
    variants = variants_of(args)
    pipeline = Pipeline(TOOLS, args.work_dir, args.cfg_options)
    shape = input_shape(args.prune, args.cfg_options)
    baseline = original(pipeline, args.baseline, args.checkpoint)
    tuned, pruned = run_stages(pipeline, args, baseline, variants)
    also = {name: options for name, *options in args.also}
    rows = measure(pipeline, [baseline, *tuned], shape, args, also)
    for name, checkpoint in pruned.items():
        picture = args.work_dir / f'channels_{name}.png'
        draw(baseline, args.cfg_options, checkpoint, picture)
    notes = {'variants': variants, 'also': also}
    write_results(pipeline, rows, shape, args, notes)
    print(f'in {args.work_dir}: results.md, results.json, channels_*.png')


if __name__ == '__main__':
    run_cli(main)
