"""Export a model to files for other runtimes, each checked against the model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from mmgfp.apps.cli import (
    Overrides,
    add_shape_argument,
    check_checkpoint,
    load_config,
    reading_config,
    run_cli,
    whole_number,
)
from mmgfp.apps.evaluation import evaluate_file
from mmgfp.apps.input_shape import deployed_shape
from mmgfp.apps.run_config import check_data
from mmgfp.apps.shown_steps import shown_steps
from mmgfp.engine.deploy import check_destination, read_trained
from mmgfp.export.files import FORMATS, RAW_NOTE, Exported, check_formats, export_files
from mmgfp.export.options import AXES, ExportOptions
from mmgfp.report.quantities import main_metric
from mmgfp.utils.errors import ConfigError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the model, pruned or not')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='folder to write')
    parser.add_argument('--name', default='model', help='name of the files')
    parser.add_argument(
        '--format',
        nargs='+',
        default=['onnx'],
        metavar='FORMAT',
        help=f'some of {", ".join(FORMATS)}',
    )
    parser.add_argument(
        '--nms',
        action='store_true',
        help='end to end: detections or probabilities leave the file; raw outputs do '
        'without it',
    )
    parser.add_argument(
        '--preprocess',
        action='store_true',
        help='the file resizes, pads and normalises an image (1, H, W, 3) of uint8',
    )
    parser.add_argument(
        '--dynamic',
        nargs='+',
        default=[],
        metavar='AXIS',
        help=f'sizes of the input that stay free: {", ".join(AXES)}',
    )
    parser.add_argument('--opset', type=whole_number(1), help="of ONNX's operators")
    parser.add_argument(
        '--dynamo', action='store_true', help='find the ONNX graph by torch.export'
    )
    parser.add_argument('--fp16', action='store_true', help='half precision')
    add_int8_arguments(parser)
    parser.add_argument(
        '--images',
        nargs='+',
        type=Path,
        default=[],
        help="for check and calibration, or folders; of the config's data by default",
    )
    add_shape_argument(
        parser, 'size of the input; that of the pruning run or of testing by default'
    )
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args()


def add_int8_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what concerns 8-bit files and tests of files."""
    parser.add_argument(
        '--int8',
        action='store_true',
        help='also 8-bit files, NAME_int8: onnx, openvino',
    )
    parser.add_argument(
        '--calib',
        type=whole_number(1),
        default=100,
        metavar='N',
        help='images on which --int8 finds ranges: of --images, or of the training set',
    )
    parser.add_argument(
        '--eval',
        action='store_true',
        help='test the files on the test set of the config; with --nms',
    )


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    options = ExportOptions(
        nms=args.nms,
        preprocess=args.preprocess,
        dynamic=tuple(args.dynamic),
        opset=args.opset or ExportOptions.default_opset(args.dynamo),
        dynamo=args.dynamo,
        fp16=args.fp16,
        calibrate=args.calib if args.int8 else 0,
    )
    check_formats(args.format, options)
    if args.eval and not (args.nms and not args.preprocess):
        got = '--preprocess' if args.nms else 'raw outputs'
        raise ConfigError(
            '--eval', 'given for results, with --nms', got, 'leave it out'
        )
    check_destination(args.out, args.name)
    check_checkpoint('checkpoint', args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
    if args.eval:
        check_data(cfg, ['test'])
    with reading_config(cfg):
        trained = read_trained(cfg, args.checkpoint)
        shape, source = deployed_shape(args.input_shape, trained, cfg)
        print(f'the input is {tuple(shape)}, {source}')
    target = (args.out, args.name, args.format, options, args.images)
    with shown_steps():
        written = export_files(cfg, trained, shape, *target)
    for file in written:
        print(file)
    if not args.nms:
        print(RAW_NOTE)
    if args.eval:
        show_results(cfg, written)


def show_results(cfg: Config, files: Sequence[Exported]) -> None:
    """Test files, and print size and metric of each."""
    rows = []
    for file in files:
        print(f'testing {file.path.name} on the test set of the config', flush=True)
        name, value = main_metric(evaluate_file(cfg, file.path))
        rows.append((file.path.name, f'{file.megabytes:.2f}', f'{value:.2f}'))
    table = Table('file')
    table.columns[0].overflow = 'fold'
    for title in ('size (MB)', name):
        table.add_column(title, justify='right', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == '__main__':
    run_cli(main)
