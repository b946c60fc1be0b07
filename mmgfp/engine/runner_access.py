"""Reading and changing what a runner holds: its model, optimizers and averages."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.optim import ApexOptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mmgfp.surgery.attributes import fix_attributes
from mmgfp.utils.errors import ConfigError


def check_not_compiled(runner: Runner, when: str, remedy: str) -> None:
    """Refuse models that torch compiles, as hooks on their modules would be left out.

    Args:
        runner: The runner, before anything is loaded.
        when: When and why the option must be off.
        remedy: What helps.

    Raises:
        ConfigError: If the config says ``compile``.
    """
    if runner.cfg.get('compile'):
        got = repr(runner.cfg.compile)
        raise ConfigError('compile', f'off {when}', got, remedy)


def averaged_models(runner: Runner) -> list[Any]:
    """Return the averaged model of each `EMAHook`; its ``module`` is the copy."""
    return [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]


def loss_scale(wrapper: Any) -> float:
    """Return the factor of the loss under mixed precision, 1 without.

    Raises:
        ConfigError: If the optimizer's wrapper does not tell.
    """
    _check_optim_wrapper(wrapper)
    scaler = getattr(wrapper, 'loss_scaler', None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def optimizer_of(wrapper: Any) -> Optimizer:
    """Return the optimizer of all that is trained, out of its wrapper.

    Raises:
        ConfigError: If there are several, or one of Apex.
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


def is_accumulating(wrapper: Any) -> bool:
    """Return whether gradients wait for further iterations before the next step."""
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return not all(w.should_update() for w in wrappers)


def rewrap_model(runner: Runner) -> None:
    """Give averages and the model's wrapper the parameters of a model that was cut.

    `MMDistributedDataParallel` has put gradients into buckets of the first sizes.
    """
    for averaged in averaged_models(runner):
        fix_attributes(averaged)
    if is_model_wrapper(runner.model):
        model = runner.model.module
        runner.model = model  # the old wrapper lets go of its parameters
        runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)


def check_model_wrapper(
    runner: Runner,
    where: str = 'where compact_interval is set',
    remedy: str = 'leave compact_interval off; units stay masked until the end',
) -> None:
    """Refuse wrappers that split parameters, or that `rewrap_model` cannot build again.

    Args:
        runner: The runner.
        where: The circumstances, for the error.
        remedy: The change that helps.

    Raises:
        ConfigError: If the model is in such a wrapper.
    """
    model = runner.model
    if is_model_wrapper(model) and not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            'model_wrapper_cfg.type',
            f'MMDistributedDataParallel {where}',
            type(model).__name__,
            remedy,
        )


def unwrap_model(model: Any) -> Any:
    """Return the model inside of a wrapper such as DDP, or the model itself."""
    return model.module if is_model_wrapper(model) else model
