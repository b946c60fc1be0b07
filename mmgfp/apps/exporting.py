"""Files for other runtimes that tools write beside a pruned model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from mmgfp.engine.deploy import Deployable, Trained
from mmgfp.export.files import FORMATS, RAW_NOTE, Exported, check_formats, export_files
from mmgfp.export.options import ExportOptions
from mmgfp.utils.errors import ConfigError


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--export FORMAT...`` and ``--nms`` to a parser."""
    parser.add_argument(
        '--export',
        nargs='+',
        default=[],
        metavar='FORMAT',
        help=f'also write the model as {", ".join(FORMATS)}; tools/export.py has more '
        'options',
    )
    parser.add_argument(
        '--nms',
        action='store_true',
        help='exported files give detections or probabilities, not raw outputs',
    )


def check_export(args: argparse.Namespace) -> None:
    """Check what `add_export_arguments` has read, before anything takes time.

    Raises:
        ConfigError: If a format is unknown, or none is given with ``--nms``.
    """
    if args.export:
        check_formats(args.export, ExportOptions(nms=args.nms))
    elif args.nms:
        remedy = 'add --export onnx, say, or leave it out'
        raise ConfigError('--nms', 'given with --export', 'no format', remedy)


def export(
    cfg: Config,
    item: Deployable,
    shape: Sequence[int],
    out: Path,
    name: str,
    args: argparse.Namespace,
) -> list[Exported]:
    """Write the files that were asked for, each checked against the model.

    Args:
        cfg: The model's config.
        item: The model.
        shape: (C, H, W) of the input.
        out: The folder.
        name: Name of the files without suffix.
        args: What `add_export_arguments` has read.

    Raises:
        ConfigError: If the model cannot be exported, or a runtime is not installed.
        ExportError: If a file does not do what the model does. No file is left then.
    """
    if not args.export:
        return []
    trained = Trained(item.model, item.structure, item.meta)
    options = ExportOptions(nms=args.nms)
    return export_files(cfg, trained, shape, out, name, args.export, options)


def reports(files: Sequence[Exported]) -> dict[str, dict[str, str]]:
    """Return what the checks saw, for a summary in JSON; nothing without files."""
    seen = {file.path.name: str(file.report) for file in files}
    return {'exported': seen} if seen else {}


def print_exported(files: Sequence[Exported], args: argparse.Namespace) -> None:
    """Print a line for each file."""
    for file in files:
        print(file)
    if files and not args.nms:
        print(RAW_NOTE)
