"""Stages that `tools/prune.py` and comparisons share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from mmgfp.apps.cli import Overrides, check_checkpoint, load_config, whole_number
from mmgfp.apps.pipeline import Candidate, Pipeline
from mmgfp.apps.processes import StageError
from mmgfp.engine.registry import PRUNING_HOOKS, is_named
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import load_weights_only


def add_timing_arguments(parser: argparse._ActionsContainer) -> None:
    """Add how often, and in which batches, models are timed."""
    parser.add_argument(
        '--latency-rounds',
        type=whole_number(0),
        default=50,
        help='how often each model is timed on the CPU; 0 times nothing',
    )
    parser.add_argument(
        '--batches',
        nargs='+',
        type=whole_number(1),
        default=[1],
        metavar='N',
        help='batch sizes that are timed',
    )


def last_checkpoint(folder: Path) -> str:
    """Return the newest checkpoint of a training run.

    Raises:
        StageError: If there is none.
    """
    newest = find_latest_checkpoint(str(folder))
    if newest is None or not Path(newest).is_file():
        raise StageError(
            f'{folder} must hold a checkpoint (got {newest}); '
            'delete the folder and run again'
        )
    return str(newest)


def pruned_checkpoint(folder: Path, config: str) -> str:
    """Return the checkpoint of the last target that a pruning run reached.

    Raises:
        StageError: If it reached none.
    """
    # A run with several targets leaves one file for each; one that ends before its
    # target marks its file as unfinished.
    saved = folder.glob(f'{Path(config).stem}_*.pth')
    reached = [path for path in saved if not path.stem.endswith('_unfinished')]
    if not reached:
        raise StageError(
            f'{folder} must hold a checkpoint of the reached target (got none); '
            'raise max_iters or units_per_step, delete the folder and '
            f'{folder.parent / "done" / folder.name}.json'
        )
    return str(max(reached, key=_iteration))


def _iteration(path: Path) -> tuple[int, str]:
    """Return the iteration of a file that pruning saved; its time may be a copy's."""
    meta = load_weights_only(path).get('meta') or {}
    return meta.get('iter', 0), path.name


def original(
    pipeline: Pipeline,
    config: str,
    checkpoint: str | None,
    options: Sequence[str] = (),
) -> Candidate:
    """Train the original model, or take the weights that the user has.

    Args:
        pipeline: Trains it.
        config: Its config.
        checkpoint: Its weights, if there are any.
        options: Overrides of its config beside those of the pipeline.

    Raises:
        ConfigError: If there is no such checkpoint.
    """
    if checkpoint is None:
        checkpoint = last_checkpoint(pipeline.train('baseline', config, options))
    check_checkpoint('--checkpoint', checkpoint)
    return Candidate('baseline', config, checkpoint, tuple(options))


def prune(
    pipeline: Pipeline, config: str, finetuning: str, baseline: Candidate
) -> Candidate:
    """Prune the original model.

    Args:
        pipeline: Runs the stage.
        config: The config that prunes.
        finetuning: The config of the pruned model.
        baseline: The original model.
    """
    options = [f'load_from={baseline.checkpoint}']
    pruned = pruned_checkpoint(pipeline.train('prune', config, options), config)
    return Candidate('pruned', finetuning, pruned, (f'model.structure={pruned}',))


def finetune(
    pipeline: Pipeline, config: str, pruned: Candidate, baseline: Candidate
) -> Candidate:
    """Fine-tune the pruned model.

    Args:
        pipeline: Runs the stage.
        config: The config that fine-tunes.
        pruned: The pruned model.
        baseline: The original model.
    """
    cfg = load_config(config, parse_options(pipeline.options))
    options = finetuning_start(cfg, pruned.checkpoint, baseline.checkpoint)
    checkpoint = last_checkpoint(pipeline.train('finetune', config, options))
    return Candidate('fine-tuned', config, checkpoint, pruned.options)


def finetuning_start(cfg: Config, pruned: Any, original: Any) -> list[str]:
    """Return overrides that give fine-tuning its model, and its teacher if any.

    Args:
        cfg: The config that fine-tunes.
        pruned: The checkpoint of the pruned model.
        original: The checkpoint of the original model, from which `model.init` may take
            weights instead, and which teaches it unless another config is named.
    """
    init = cfg.model.get('init', 'pruned')
    options = [f'load_from={pruned if init == "pruned" else None}']
    options += [f'model.structure={pruned}']
    options += [f'model.original={original}'] if init == 'original' else []
    for index, hook in enumerate(cfg.get('custom_hooks') or []):
        if is_named(hook.get('type'), 'DistillationHook') and not hook.get('teacher'):
            options.append(f'custom_hooks.{index}.checkpoint={original}')
    return options


def deploy(
    pipeline: Pipeline, tuned: Candidate, shape: Sequence[int], *flags: str
) -> Candidate:
    """Deploy the fine-tuned model; return it as it is read from its folder."""
    name, out = Path(tuned.config).stem, pipeline.work_dir / 'deploy'
    pipeline.run(
        'deploy',
        'deploy_pruned',
        *(tuned.config, tuned.checkpoint, '--out', str(out), '--name', name),
        *('--input-shape', *map(str, shape), *flags),
        options=tuned.options,
    )
    return Candidate(tuned.name, str(out / f'{name}.py'), str(out / f'{name}.pth'))


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` overrides as the other tools do.

    Examples:
        >>> parse_options(['custom_hooks.0.interval=5', 'load_from=a.pth'])
        {'custom_hooks.0.interval': 5, 'load_from': 'a.pth'}
    """
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=Overrides, default={})
    return parser.parse_args(['--cfg-options', *options]).cfg_options


def find_hook(cfg: Config) -> tuple[int, Mapping[str, Any]]:
    """Find the pruning hook in `custom_hooks`.

    Returns:
        Its index and its settings.

    Raises:
        ConfigError: If there is none with an `input_shape`.
    """
    for index, hook in enumerate(cfg.get('custom_hooks') or []):
        if is_named(hook.get('type'), *PRUNING_HOOKS) and 'input_shape' in hook:
            return index, hook
    raise ConfigError(
        f'{cfg.filename} must have a {" or ".join(PRUNING_HOOKS)} with input_shape in '
        'custom_hooks (got none); add input_shape=(C, H, W) to it'
    )


def input_shape(config: str, options: Sequence[str] = ()) -> tuple[int, ...]:
    """Read the input shape (C, H, W) at which the pruning hook counts costs."""
    _, hook = find_hook(load_config(config, parse_options(options)))
    return tuple(hook['input_shape'])
