"""Test a model: OpenMMLab's test tool for mmgfp."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from torch import nn

from mmgfp.apps.cli import (
    add_runner_arguments,
    check_checkpoint,
    load_config,
    parse_runner_args,
    run_cli,
    whole_number,
    write_json,
)
from mmgfp.apps.evaluation import fit_to_file, runner_to_test
from mmgfp.apps.run_config import (
    check_entries,
    configure_run,
    prepare_config,
)
from mmgfp.engine.runner_access import unwrap_model
from mmgfp.export.exported_model import ExportedModel
from mmgfp.runtimes import RUNTIMES, open_model
from mmgfp.surgery.fit import check_shapes
from mmgfp.surgery.structure import STRUCTURE_KEY
from mmgfp.utils.errors import ConfigError, StructureError
from mmgfp.utils.io import check_folder, load_weights_only


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_runner_arguments(parser)
    parser.add_argument(
        'checkpoint', help='the checkpoint to test, or with --runtime an exported file'
    )
    parser.add_argument(
        '--runtime',
        choices=RUNTIMES.names(),
        help='test a file that tools/export.py --nms wrote in this runtime',
    )
    parser.add_argument(
        '--threads', type=whole_number(1), help='threads of the runtime'
    )
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--json', help='write the metrics to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='save painted images under the work dir')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds to show an image for'
    )
    return parse_runner_args(parser)


def check_args(args: argparse.Namespace) -> None:
    """Check the arguments before anything is built.

    Raises:
        ConfigError: If the checkpoint is missing or `--out` is no pickle file.
        SavingError: If a file cannot be written where it shall be.
    """
    if args.runtime is None:
        check_weights(args.checkpoint)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError('--out', 'a .pkl file', args.out, 'rename it')
    for path in filter(None, (args.out, args.json)):
        check_folder(Path(path).parent)


def check_weights(path: str) -> None:
    """Check that this is a checkpoint, and name the runtime of an exported file.

    Raises:
        ConfigError: If it is no checkpoint, or an exported file.
        StructureError: If it is damaged or holds no weights.
    """
    suffix = Path(path).suffix
    opens = [name for name in RUNTIMES.names() if suffix in RUNTIMES[name].suffixes]
    try:
        check_checkpoint('checkpoint', path)
    except StructureError:
        if not opens:
            raise
        # Tried before, as checkpoints may end in .pt like TorchScript files.
        raise ConfigError(
            'checkpoint',
            'one of PyTorch without --runtime',
            path,
            f'add --runtime {" or ".join(opens)} to test an exported file',
        ) from None


def check_widths(model: nn.Module, path: str, config: str) -> None:
    """Refuse a pruned checkpoint of other widths, most of which would not be loaded.

    Raises:
        StructureError: If the checkpoint holds a structure that is not the model's.
    """
    checkpoint = {} if '://' in path else load_weights_only(path)
    if STRUCTURE_KEY in checkpoint:
        check_shapes(
            checkpoint['state_dict'],
            {name: tensor.shape for name, tensor in model.state_dict().items()},
            f'as in the model of {config}',
            'give the config that tools/deploy_pruned.py writes beside the pruned '
            'weights, or a PrunedModel config with this structure',
        )


def show_results(cfg: Config, args: argparse.Namespace) -> None:
    """Make the config's visualization hook show or save the predictions.

    Raises:
        ConfigError: If the config has no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ConfigError(
            '--show must have default_hooks.visualization in the config (got none); '
            'add the visualization hook of your library'
        )
    # MMDetection's hook calls the switch `draw`, MMPreTrain's `enable`.
    pretrain = hook.type == 'VisualizationHook'
    hook['enable' if pretrain else 'draw'] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    if args.show_dir:
        hook['out_dir' if pretrain else 'test_out_dir'] = args.show_dir


def dump_metric(cfg: Config, out: str) -> DumpResults:
    """Return the metric that writes the predictions to `out`."""
    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=out)
    return DumpResults(out_file_path=out)


def write_metrics(path: str, metrics: dict[str, Any]) -> None:
    """Write metrics as JSON; tensors become numbers, or lists of them."""
    write_json(path, {key: _number(value) for key, value in metrics.items()})


def _number(value: Any) -> Any:
    if not hasattr(value, 'tolist'):
        return value
    return value.item() if np.prod(value.shape) == 1 else value.tolist()


def main() -> None:
    """Build the runner from the command line and test."""
    args = parse_args()
    check_args(args)
    cfg = load_config(args.config, args.cfg_options)
    prepare_config(cfg, ['test'])
    check_entries(cfg, 'test')
    configure_run(cfg, args)
    session = None
    if args.runtime:
        session = open_model(args.checkpoint, args.runtime, args.threads)
        fit_to_file(cfg, session)
    cfg.load_from = None if session else args.checkpoint
    if args.show or args.show_dir:
        show_results(cfg, args)
    runner = runner_to_test(cfg)
    if session is None:
        check_widths(unwrap_model(runner.model), args.checkpoint, args.config)
    else:
        runner.model = ExportedModel(session, runner.model)
    if args.out:
        runner.test_evaluator.metrics.append(dump_metric(cfg, args.out))
    metrics = runner.test()
    if args.json:
        write_metrics(args.json, metrics)


if __name__ == '__main__':
    run_cli(main)
