"""Train, prune, fine-tune, deploy and compare: one run from config to table.

Every stage runs another tool in a process of its own. A finished stage is not run
again, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgfp.apps.cli import run_cli
from mmgfp.apps.comparison import draw, measure, write_results
from mmgfp.apps.pipeline import Pipeline
from mmgfp.apps.stages import (
    add_arguments,
    check_arguments,
    deploy,
    input_shape,
    original,
    prune_and_finetune,
)

TOOLS = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Run every stage, measure, write the results."""
    args = parse_args()
    pipeline = Pipeline(TOOLS, args.work_dir, args.cfg_options)
    check_arguments(args)
    shape = input_shape(args.prune, args.cfg_options)
    baseline = original(pipeline, args.baseline, args.checkpoint)
    pruned, tuned = prune_and_finetune(pipeline, args, baseline)
    deployed = deploy(pipeline, tuned, shape)
    rows = measure(pipeline, [baseline, pruned, deployed], shape, args)
    picture = args.work_dir / 'channels.png'
    draw(baseline, args.cfg_options, pruned.checkpoint, picture)
    write_results(pipeline, rows, shape, args)
    print(f'in {args.work_dir}: results.md, results.json, channels.png, deploy/')


if __name__ == '__main__':
    run_cli(main)
