"""Export a model to files for other runtimes, each checked against the model."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmgfp.apps.cli import (
    Overrides,
    add_shape_argument,
    check_checkpoint,
    load_config,
    reading_config,
    run_cli,
    whole_number,
)
from mmgfp.apps.input_shape import deployed_shape
from mmgfp.engine.deploy import check_destination, read_trained
from mmgfp.export.files import FORMATS, check_formats, export_files
from mmgfp.export.options import AXES, ExportOptions


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
    parser.add_argument(
        '--images',
        nargs='+',
        type=Path,
        default=[],
        help='to check on, or folders of them; the test dataset by default',
    )
    add_shape_argument(
        parser, 'size of the input; that of the pruning run or of testing by default'
    )
    parser.add_argument('--cfg-options', nargs='+', action=Overrides)
    return parser.parse_args()


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
    )
    check_formats(args.format, options)
    check_destination(args.out, args.name)
    check_checkpoint('checkpoint', args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
    with reading_config(cfg):
        trained = read_trained(cfg, args.checkpoint)
        shape, source = deployed_shape(args.input_shape, trained, cfg)
        print(f'the input is {tuple(shape)}, {source}')
    written = export_files(
        cfg, trained, shape, args.out, args.name, args.format, options, args.images
    )
    for file in written:
        print(file)


if __name__ == '__main__':
    run_cli(main)
