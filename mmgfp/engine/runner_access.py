"""What the pruning hook wants to know about the runner and the hooks beside it."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import ApexOptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mmgfp.surgery.attributes import fix_attributes
from mmgfp.utils.errors import ConfigError


def saves_now(hook: Hook, runner: Runner) -> bool:
    """Whether ``hook`` is about to write a checkpoint of this iteration."""
    return (
        isinstance(hook, CheckpointHook)
        and not hook.by_epoch
        and (
            hook.every_n_train_iters(runner, hook.interval)
            or hook.is_last_train_iter(runner)
        )
    )


def averaged_models(runner: Runner) -> list[Any]:
    """The averaged models of all `EMAHook`, each with its copy in ``module``."""
    return [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]


def loss_scale(wrapper: Any) -> float:
    """What losses are multiplied with under mixed precision.

    Raises:
        ConfigError: The optimizer's wrapper does not say it.
    """
    _check_optim_wrapper(wrapper)
    scaler = getattr(wrapper, 'loss_scaler', None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def optimizer_of(wrapper: Any) -> Optimizer:
    """The optimizer of all that is trained, out of its wrapper.

    Raises:
        ConfigError: There are several, or one of Apex.
    """
    _check_optim_wrapper(wrapper)
    return wrapper.optimizer


def _check_optim_wrapper(wrapper: Any) -> None:
    if isinstance(wrapper, ApexOptimWrapper | OptimWrapperDict):
        raise ConfigError(
            'optim_wrapper.type',
            'one that shows by what it scales the loss',
            type(wrapper).__name__,
            'use OptimWrapper, or AmpOptimWrapper for mixed precision',
        )


def rewrap_model(runner: Runner) -> None:
    """Let all that holds on to parameters have those that took their places.

    `MMDistributedDataParallel` puts gradients into buckets of the first sizes.
    """
    for averaged in averaged_models(runner):
        fix_attributes(averaged)
    if is_model_wrapper(runner.model):
        model = runner.model.module
        runner.model = model  # the old wrapper lets go of its parameters
        runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)


def check_wrapper(runner: Runner) -> None:
    """Refuse wrappers that `rewrap_model` cannot build again.

    Raises:
        ConfigError: The model is in one.
    """
    model = runner.model
    if is_model_wrapper(model) and not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            'model_wrapper_cfg.type',
            'MMDistributedDataParallel where compact_interval is set',
            type(model).__name__,
            'leave compact_interval off; units stay masked until the end',
        )


def unwrapped(model: Any) -> Any:
    """The model inside of a wrapper such as DDP."""
    return model.module if is_model_wrapper(model) else model
