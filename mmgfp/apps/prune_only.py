"""Pruning without training on the command line: `tools/prune.py --no-train`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from mmengine.config import Config

from mmgfp.apps.cli import check_checkpoint, load_config, write_json
from mmgfp.apps.detections import draw_detections
from mmgfp.apps.exporting import check_export, export, print_exported, reports
from mmgfp.apps.prune_outcome import (
    Outcome,
    beyond_target,
    cells,
    deployable,
    left_alone,
    summary,
)
from mmgfp.apps.prune_recipe import Recipe, pruning_options, shares_of
from mmgfp.apps.prune_run import prune, validation_of
from mmgfp.apps.reporting import report_on
from mmgfp.apps.rounds_file import RoundsFile
from mmgfp.apps.run_config import data_of
from mmgfp.apps.sensitivity_run import validation_split
from mmgfp.apps.shown_steps import shown_steps
from mmgfp.apps.stages import parse_options
from mmgfp.apps.tables import print_table
from mmgfp.engine.deploy import check_destination, deploy
from mmgfp.utils.io import check_folder
from mmgfp.utils.words import counted


def prune_only(args: argparse.Namespace) -> None:
    """Prune, test and write what the command line asks for.

    Args:
        args: The command line of `tools/prune.py`; ``cfg_options`` as a list of texts.

    Raises:
        MMGFPError: If an argument is wrong, or the model cannot be pruned.
    """
    check_export(args)
    check_checkpoint('checkpoint', args.checkpoint)
    cfg = load_config(args.config, parse_options(args.cfg_options))
    names = ('target', 'criterion', 'normalize', 'divisor', 'keep', 'input_shape')
    options = pruning_options(cfg, **{name: getattr(args, name) for name in names})
    shares = shares_of(options, args.rounds)
    data = (args.images, args.batch_size, args.label_free)
    recipe = Recipe(options, args.compensate, shares, *data)
    (target,) = options.targets
    name = args.name or f'{Path(args.config).stem}_{target.label}'
    check_destination(args.work_dir, name, '--work-dir')
    check_folder(args.work_dir)
    file = RoundsFile(args.work_dir, recipe.settings(cfg, args.checkpoint))
    testing = (args.metric, args.max_images, args.work_dir / 'logs')
    validation = validation_of(cfg, args.checkpoint, *testing)
    outcome = prune(cfg, args.checkpoint, recipe, validation, file)
    write(cfg, outcome, name, args)
    file.remove()


def write(cfg: Config, outcome: Outcome, name: str, args: argparse.Namespace) -> None:
    """Write all files, and print what they are of."""
    item, out = deployable(cfg, outcome), args.work_dir
    if (out / f'{name}.pth').is_file():
        print(f'{out / name}.pth: the result of an earlier call is replaced')
    paths = deploy(cfg, item, out, name)
    write_json(out / 'summary.json', summary(outcome))
    for line in left_alone(outcome):
        print(line)
    print_table(cells(outcome))
    if outcome.metric is not None:
        loader = f'{validation_split(cfg)}_dataloader'
        print(f'tested by {loader}: {data_of(cfg[loader])}')
    if beyond := beyond_target(outcome):
        print(beyond)
    cuts = counted(len(outcome.pruned.rounds), 'cut')
    print(f'{cuts} in {outcome.seconds / 60:.1f} min, without training')
    models = {'original': outcome.original.model, 'pruned': outcome.pruned.model}
    written = [*paths.values(), out / 'summary.json']
    written += [out / n for n in report_on(out, partial(draw_detections, cfg, models))]
    print(f'wrote {", ".join(map(str, written))}', flush=True)
    # Last, as the model is there even if a format is refused.
    with shown_steps():
        files = export(cfg, item, outcome.shape, out, name, args)
    if files:
        write_json(out / 'summary.json', summary(outcome) | reports(files))
        print_exported(files, args)
