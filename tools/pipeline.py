"""Train, prune, fine-tune, deploy and compare: one run from config to table.

Every stage is one of the other tools in a process of its own. A stage that has
finished is not run again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgfp.apps.cli import run_cli
from mmgfp.apps.comparison import draw, measure, write_results
from mmgfp.apps.stages import (
    Candidate,
    Pipeline,
    add_arguments,
    input_shape,
    last_checkpoint,
    original,
    pruned_checkpoint,
)

TOOLS = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return parser.parse_args()


def run_stages(
    pipeline: Pipeline, args: argparse.Namespace, shape: tuple[int, ...]
) -> list[Candidate]:
    """Trains, prunes, fine-tunes and deploys; returns what is to be compared."""
    baseline = original(pipeline, args.baseline, args.checkpoint)
    folder = pipeline.train('prune', args.prune, [f'load_from={baseline.checkpoint}'])
    pruned = pruned_checkpoint(folder, args.prune)
    rebuild = (f'model.structure={pruned}',)
    folder = pipeline.train(
        'finetune', args.finetune, [f'load_from={pruned}', *rebuild]
    )
    name, out = Path(args.finetune).stem, pipeline.work_dir / 'deploy'
    pipeline.run(
        'deploy',
        'deploy_pruned',
        *(args.finetune, last_checkpoint(folder), '--out', str(out), '--name', name),
        *('--input-shape', *map(str, shape)),
        options=rebuild,
    )
    return [
        baseline,
        Candidate('pruned', args.finetune, pruned, rebuild),
        Candidate('fine-tuned', str(out / f'{name}.py'), str(out / f'{name}.pth')),
    ]


def main() -> None:
    """Runs every stage, measures, writes the results."""
    args = parse_args()
    pipeline = Pipeline(TOOLS, args.work_dir, args.cfg_options)
    shape = input_shape(args.prune, args.cfg_options)
    candidates = run_stages(pipeline, args, shape)
    rows = measure(pipeline, candidates, shape, args)
    baseline, pruned, _ = candidates
    picture = args.work_dir / 'channels.png'
    draw(baseline, args.cfg_options, pruned.checkpoint, picture)
    write_results(pipeline, rows, shape, args)
    print(f'in {args.work_dir}: results.md, results.json, channels.png, deploy/')


if __name__ == '__main__':
    run_cli(main)
