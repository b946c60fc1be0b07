"""Make a trained model smaller: prune, fine-tune, test and deploy it in one command.

CONFIG is the ordinary one that trained the model; it need not know of mmgfp. Two
configs are written into the work directory, of pruning and of fine-tuning, to keep and
to edit. By them the model is pruned while it trains, at a tenth of its learning rate,
and the result is fine-tuned, tested and deployed. Without CHECKPOINT the model is
trained first. The same command goes on where an interrupted one was.

With --no-train, units are scored by some training images, those that matter least go,
and the layers that read them are refitted so that they give what they gave
(docs/compensation.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgfp.apps.cli import (
    Targets,
    add_shape_argument,
    load_config,
    run_cli,
    whole_number,
)
from mmgfp.apps.exporting import add_export_arguments
from mmgfp.apps.one_command import prune_and_train
from mmgfp.apps.prune_only import prune_only
from mmgfp.apps.prune_recipe import COMPENSATIONS
from mmgfp.apps.run_config import data_root_options
from mmgfp.apps.stages import add_timing_arguments, parse_options
from mmgfp.utils.errors import ConfigError

TOOLS = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: If arguments are missing, or do not go together.
    """
    groups = training_options(), written_options(), no_train_options()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=groups,
    )
    parser.add_argument('config', help='config that trained the model')
    parser.add_argument('checkpoint', nargs='?', help='weights of the unpruned model')
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    check_together(args, *(vars(group.parse_args([])) for group in groups))
    return args


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments of both ways."""
    parser.add_argument(
        '--target',
        nargs='+',
        action=Targets,
        help='shares of costs that shall be left, such as flops=0.5 latency=0.6',
    )
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--data-root', metavar='DIR', help='where the data is')
    parser.add_argument(
        '--no-train', action='store_true', help='prune without training'
    )
    parser.add_argument('--criterion', help="how units are scored; default: 'fisher'")
    parser.add_argument('--normalize', help='cost that scores are divided by')
    parser.add_argument(
        '--divisor',
        type=whole_number(1),
        help='widths come to rest at multiples of it; default: 8',
    )
    parser.add_argument('--keep', nargs='+', help='layers that are never pruned')
    add_shape_argument(
        parser,
        'image for costs; default: its size in testing, or, where the config names '
        "none, the library's default; with --no-train that of the first batch",
    )
    add_export_arguments(parser)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='config entries to override, as key.sub=value',
    )


def training_options() -> argparse.ArgumentParser:
    """Return a parser of the options of pruning with training."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group('with training')
    group.add_argument(
        '--dry-run',
        action='store_true',
        help='write the configs and show what can be pruned, no more',
    )
    group.add_argument(
        '--prune-config', metavar='FILE', help='your own, of pruning, is taken instead'
    )
    group.add_argument(
        '--finetune-config', metavar='FILE', help='your own, of fine-tuning'
    )
    add_timing_arguments(group)
    return parser


def written_options() -> argparse.ArgumentParser:
    """Return a parser of the options of the configs that are written."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group('configs that are written')
    group.add_argument(
        '--epochs',
        type=whole_number(1),
        help='of fine-tuning; default: as long as the config trains',
    )
    group.add_argument(
        '--latency-profile',
        metavar='FILE',
        help='of tools/profile_latency.py; measured if the target needs one',
    )
    return parser


def no_train_options() -> argparse.ArgumentParser:
    """Return a parser of the options of pruning without training."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group('with --no-train')
    group.add_argument(
        '--images', type=whole_number(1), default=512, help='training images to use'
    )
    group.add_argument(
        '--batch-size', type=whole_number(1), help="default: the config's"
    )
    group.add_argument(
        '--rounds',
        nargs='+',
        metavar='N',
        help='number of cuts, each with scores of its own, or the shares of the cost '
        'that they leave, down to the target; default: as many cuts as take a quarter '
        'or less each',
    )
    group.add_argument(
        '--compensate',
        choices=COMPENSATIONS,
        default='fisher',
        help='how layers that read removed channels are refitted',
    )
    group.add_argument(
        '--label-free',
        action='store_true',
        help="no annotations: the distance to the model's own outputs is the loss",
    )
    group.add_argument(
        '--max-images',
        type=whole_number(0),
        help='test on so many images, not on all; 0 tests nothing',
    )
    group.add_argument('--metric', help="default: COCO's mAP or the top-1 accuracy")
    group.add_argument('--name', help="name of the files; default: the config's")
    return parser


def check_together(
    args: argparse.Namespace,
    training: Mapping[str, Any],
    written: Mapping[str, Any],
    no_train: Mapping[str, Any],
) -> None:
    """Refuse arguments that are missing, or would have no effect.

    Args:
        args: All arguments.
        training: Options of pruning with training, with their defaults.
        written: Those of the configs that are written.
        no_train: Those of pruning without training.

    Raises:
        ConfigError: If there are any.
    """
    own = [args.prune_config, args.finetune_config]
    if any(own) and not all(own):
        got, remedy = 'one of them', 'give both, or edit those that are written'
        raise ConfigError('--prune-config and --finetune-config', 'both', got, remedy)
    if args.no_train:
        refuse(args, {**training, **written}, 'without --no-train')
    else:
        refuse(args, no_train, 'with --no-train')
    if any(own):
        names = ('target', 'criterion', 'normalize', 'divisor', 'keep', 'input_shape')
        unused = {**written, **dict.fromkeys(names)}
        refuse(args, unused, 'without --prune-config, which says it')
    elif args.target is None:
        remedy = 'give --target flops=0.5, say'
        raise ConfigError('--target', 'given', 'none', remedy)
    if args.no_train and args.checkpoint is None:
        remedy = 'name the weights of the unpruned model'
        raise ConfigError('checkpoint', 'given with --no-train', 'none', remedy)


def refuse(
    args: argparse.Namespace, defaults: Mapping[str, Any], condition: str
) -> None:
    """Refuse arguments that differ from their defaults.

    Raises:
        ConfigError: If one does.
    """
    for name, default in defaults.items():
        if getattr(args, name) != default:
            option = f'--{name.replace("_", "-")}'
            raise ConfigError(option, f'given {condition}', option, 'drop one of them')


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    print(f'reading {args.config} and its data', flush=True)
    if args.data_root is not None:
        cfg = load_config(args.config, parse_options(args.cfg_options))
        args.cfg_options = [*args.cfg_options, *data_root_options(cfg, args.data_root)]
    if args.no_train:
        prune_only(args)
    else:
        prune_and_train(args, TOOLS)


if __name__ == '__main__':
    run_cli(main)
