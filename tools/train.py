"""Train, prune or fine-tune a model: OpenMMLab's training tool for mmgfp."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmgfp.apps.cli import check_checkpoint, load_config, run_cli
from mmgfp.apps.run_config import prepare_config
from mmgfp.engine.checkpoints import newest_checkpoint
from mmgfp.engine.distributed import use_cpus
from mmgfp.utils.errors import ConfigError


def parse_args() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help='a config file, or one of the zoo: mmdet::<path>'
    )
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the newest in the work dir',
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


def enable_amp(cfg: Config) -> None:
    """Switches `cfg.optim_wrapper` to mixed precision.

    Raises:
        ConfigError: If a custom optimizer wrapper is set.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ConfigError(
            f"--amp must replace an optim_wrapper.type 'OptimWrapper' (got {kind!r}); "
            'choose an AMP wrapper in the config instead'
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Switches learning rate scaling on.

    Raises:
        ConfigError: If the config does not say for which batch size its rate is.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise ConfigError(
            '--auto-scale-lr must have auto_scale_lr.base_batch_size in the config '
            '(got none); add auto_scale_lr=dict(base_batch_size=16)'
        )
    cfg.auto_scale_lr.enable = True


def apply_resume(cfg: Config, resume: str | None) -> None:
    """Sets `cfg.resume` and `cfg.load_from` from the value of `--resume`.

    Without a value the newest checkpoint in the work dir is resumed from. If
    there is none yet, the run starts as it would without the flag, from the
    config's own `load_from`.

    Raises:
        ConfigError: If the checkpoint to resume from is missing.
    """
    if resume is None:
        return
    found = newest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if found is None:
        return
    if not Path(found).is_file():
        raise ConfigError(
            '--resume', 'a checkpoint file', f'nothing at {found}', 'check the path'
        )
    cfg.resume = True
    cfg.load_from = str(found)


def main() -> None:
    """Builds the runner from the command line and trains."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    prepare_config(cfg, ('train', 'val'))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    apply_resume(cfg, args.resume)
    if cfg.get('load_from'):
        check_checkpoint('load_from', cfg.load_from)
    use_cpus(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.train()


if __name__ == '__main__':
    run_cli(main)
