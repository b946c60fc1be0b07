"""Prune a trained model without training, by some of its training images.

CONFIG is the ordinary one that trained the model; it need not know of mmgfp. Units are
scored by the training images, those that matter least go, and the layers that read them
are refitted so that they give what they gave (docs/compensation.md). The folder that is
written holds a config, weights and the structure, for tools/test.py, tools/export.py,
and for fine-tuning. The same command goes on where an interrupted one was, after its
last cut.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from mmgfp.apps.cli import (
    Overrides,
    add_shape_argument,
    check_checkpoint,
    load_config,
    run_cli,
    whole_number,
    write_json,
)
from mmgfp.apps.exporting import (
    add_export_arguments,
    check_export,
    export,
    print_exported,
    reports,
)
from mmgfp.apps.prune_recipe import (
    COMPENSATIONS,
    Recipe,
    pruning_options,
    shares_of,
)
from mmgfp.apps.prune_run import (
    Outcome,
    cells,
    deployable,
    left_alone,
    prune,
    summary,
    validation_of,
)
from mmgfp.apps.rounds_file import RoundsFile
from mmgfp.apps.tables import print_table
from mmgfp.engine.deploy import check_destination, deploy
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import check_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config that trained the model')
    parser.add_argument('checkpoint', help='weights of the unpruned model')
    parser.add_argument(
        '--target', nargs=1, action=Overrides, required=True, help='such as flops=0.7'
    )
    parser.add_argument(
        '--no-train', action='store_true', help='required; training has tools/train.py'
    )
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument(
        '--images', type=whole_number(2), default=512, help='training images to use'
    )
    parser.add_argument(
        '--batch-size', type=whole_number(1), help="default: the config's"
    )
    parser.add_argument(
        '--rounds',
        nargs='+',
        metavar='N',
        help='number of cuts, each with scores of its own, or the shares of the cost '
        'that they leave, down to the target; default: as many cuts as take a quarter '
        'or less each',
    )
    parser.add_argument(
        '--compensate',
        choices=COMPENSATIONS,
        default='fisher',
        help='how layers that read removed channels are refitted',
    )
    parser.add_argument(
        '--label-free',
        action='store_true',
        help="no annotations: the distance to the model's own outputs is the loss",
    )
    add_options(parser)
    add_export_arguments(parser)
    parser.add_argument('--name', help="name of the files; default: the config's")
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what else pruning and tests can be told."""
    parser.add_argument('--criterion', help="how units are scored; default: 'fisher'")
    parser.add_argument('--normalize', help='cost that scores are divided by')
    parser.add_argument(
        '--divisor',
        type=whole_number(1),
        help='widths come to rest at multiples of it; default: 8',
    )
    parser.add_argument('--keep', nargs='+', help='layers that are never pruned')
    add_shape_argument(parser, 'image for costs; default: that of the first batch')
    parser.add_argument(
        '--max-images',
        type=whole_number(0),
        help='test on so many images, not on all; 0 tests nothing',
    )
    parser.add_argument('--metric', help="default: COCO's mAP or the top-1 accuracy")


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    if not args.no_train:
        raise ConfigError(
            '--no-train',
            'given, as this tool does not train',
            'a command without it',
            'add it, or prune while training: tools/train.py with a config that has a '
            'ChannelPruningHook',
        )
    check_export(args)
    check_checkpoint('checkpoint', args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
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
    paths = deploy(cfg, item, out, name)
    write_json(out / 'summary.json', summary(outcome))
    for line in left_alone(outcome):
        print(line)
    print_table(cells(outcome))
    rounds = len(outcome.pruned.rounds)
    cuts = '1 cut' if rounds == 1 else f'{rounds} cuts'
    print(f'{cuts} in {outcome.seconds / 60:.1f} min, without training')
    print(f'wrote {", ".join(str(p) for p in paths.values())}', flush=True)
    # Last, as the model is there even if a format is refused.
    if files := export(cfg, item, outcome.shape, out, name, args):
        write_json(out / 'summary.json', summary(outcome) | reports(files))
        print_exported(files, args)


if __name__ == '__main__':
    run_cli(main)
