"""Test a model: OpenMMLab's test tool for mmgfp."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmgfp.apps.cli import check_checkpoint, load_config, run_cli
from mmgfp.apps.run_config import prepare_config
from mmgfp.utils.errors import ConfigError


def parse_args() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help='a config file, or one of the zoo: mmdet::<path>'
    )
    parser.add_argument('checkpoint', help='the checkpoint to test')
    parser.add_argument('--work-dir', help='where logs go')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--json', help='write the metrics to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='save painted images under the work dir')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds to show an image for'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='config entries to override, as key.sub=value; data_root=DIR moves '
        'every dataset',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def check_args(args: argparse.Namespace) -> None:
    """Checks what can be checked before anything is built.

    Raises:
        ConfigError: If the checkpoint is missing or `--out` is no pickle file.
    """
    check_checkpoint('checkpoint', args.checkpoint)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError('--out', 'a .pkl file', args.out, 'rename it')


def show_results(cfg: Config, args: argparse.Namespace) -> None:
    """Has the config's visualization hook show or save the predictions.

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
    """Returns the metric that writes the predictions to `out`."""
    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=out)
    return DumpResults(out_file_path=out)


def write_metrics(path: str, metrics: dict[str, Any]) -> None:
    """Writes metrics as JSON, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + '.part')
    draft.write_text(json.dumps({key: float(metrics[key]) for key in metrics}))
    draft.replace(target)


def main() -> None:
    """Builds the runner from the command line and tests."""
    args = parse_args()
    check_args(args)
    cfg = load_config(args.config, args.cfg_options)
    prepare_config(cfg, ['test'])
    cfg.launcher = args.launcher
    cfg.load_from = args.checkpoint
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    if args.show or args.show_dir:
        show_results(cfg, args)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(dump_metric(cfg, args.out))
    metrics = runner.test()
    if args.json:
        write_metrics(args.json, metrics)


if __name__ == '__main__':
    run_cli(main)
