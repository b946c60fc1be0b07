"""Prune one model in several ways to the same target, and compare the results.

Each variant changes settings of the pruning hook; all start from the same weights
and are fine-tuned by the same config. Without --variant they are the four of the
paper: -M, -F and -U by what the importance is divided by, and -I, which leaves
coupled channels alone. Every stage runs in a process of its own, and a finished stage
is not run again, so the same command continues after an interruption. tools/compare.py
does the same for several targets and seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmgfp.apps.cli import load_config, run_cli
from mmgfp.apps.compare.report import compare
from mmgfp.apps.compare.settings import Comparison
from mmgfp.apps.compare.variants import Variant
from mmgfp.apps.comparison import draw
from mmgfp.apps.pipeline import Candidate
from mmgfp.apps.stages import add_timing_arguments, parse_options
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import check_folder

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
    parser.add_argument('baseline', help='config that trains the original model')
    parser.add_argument('prune', help='config that prunes it')
    parser.add_argument('finetune', help='config that fine-tunes the pruned model')
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument(
        '--checkpoint', help='weights of the original model, which is not trained then'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='config entries to override in every stage, as key.sub=value',
    )
    add_timing_arguments(parser)
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


def comparison_of(args: argparse.Namespace) -> Comparison:
    """Return what the command line asks for: each variant once, as configured."""
    variants = variants_of(args)
    return Comparison(
        baseline=args.baseline,
        prune=args.prune,
        finetune=args.finetune,
        variants=tuple(
            Variant(name, pruning=parse_options(settings))
            for name, settings in variants.items()
        ),
        checkpoint=args.checkpoint,
        also={name: options for name, *options in args.also},
        options=parse_options(args.cfg_options),
        batches=args.batches,
        latency_rounds=args.latency_rounds,
    )


def main() -> None:
    """Run every stage, measure, write the results."""
    args = parse_args()
    comparison = comparison_of(args)
    # What would only fail in a later stage.
    for config in (args.baseline, args.prune, args.finetune):
        load_config(config, parse_options(args.cfg_options))
    check_folder(args.work_dir)
    (baseline, *results), failures = compare(comparison, TOOLS, args.work_dir)
    original = Candidate('baseline', baseline['config'], baseline['checkpoint'])
    for result in results:
        picture = args.work_dir / f'channels_{result["variant"]}.png'
        draw(original, (), result['pruned'], picture)
    print(f'in {args.work_dir}: results.md, results.json, curves.svg, channels_*.png')
    sys.exit(bool(failures))


if __name__ == '__main__':
    run_cli(main)
