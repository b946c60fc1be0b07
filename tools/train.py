"""Train, prune or fine-tune a model: OpenMMLab's training tool for mmgfp."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config

from mmgfp.apps.cli import (
    add_runner_arguments,
    check_checkpoint,
    load_config,
    parse_runner_args,
    reading_config,
    run_cli,
)
from mmgfp.apps.run_config import (
    build_runner,
    check_entries,
    configure_run,
    prepare_config,
)
from mmgfp.engine.checkpoints import newest_checkpoint
from mmgfp.engine.distributed import use_cpus
from mmgfp.utils.errors import ConfigError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_runner_arguments(parser)
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
    return parse_runner_args(parser)


def enable_amp(cfg: Config) -> None:
    """Switch `cfg.optim_wrapper` to mixed precision.

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
    """Switch learning rate scaling on.

    Raises:
        ConfigError: If the config does not name the batch size its rate was set for.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise ConfigError(
            '--auto-scale-lr must have auto_scale_lr.base_batch_size in the config '
            '(got none); add auto_scale_lr=dict(base_batch_size=16)'
        )
    cfg.auto_scale_lr.enable = True


def apply_resume(cfg: Config, resume: str | None) -> None:
    """Set `cfg.resume` and `cfg.load_from` from the value of `--resume`.

    Without a value, resume from the newest checkpoint in the work dir. While there is
    none yet, the run starts as it would without the flag, from the config's own
    `load_from`, so that one command both starts a run and continues it.

    Raises:
        ConfigError: If the checkpoint to resume from is missing.
    """
    if resume is None:
        return
    path = newest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if path is None:
        return
    if not Path(path).is_file():
        raise ConfigError(
            '--resume', 'a checkpoint file', f'nothing at {path}', 'check the path'
        )
    cfg.resume = True
    cfg.load_from = str(path)


def main() -> None:
    """Build the runner from the command line and train."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    prepare_config(cfg, ('train', 'val'))
    check_entries(cfg, 'train')
    configure_run(cfg, args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    apply_resume(cfg, args.resume)
    # The runner would load it only after everything else is built.
    if cfg.get('load_from'):
        check_checkpoint('load_from', cfg.load_from, bool(cfg.get('resume')))
    use_cpus(cfg)
    with reading_config(cfg):
        runner = build_runner(cfg)
        runner.train_loop  # noqa: B018 - is built when it is read
    runner.train()


if __name__ == '__main__':
    run_cli(main)
