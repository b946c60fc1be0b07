"""When to prune, what to log and what to save during a run of MMEngine's runner."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.checkpoint import REMEDY, discovery_from_dict, discovery_to_dict
from mmgfp.config import PruningConfig
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.distributed import broadcast_result, sum_over_processes
from mmgfp.engine.hooks.exact_resume import exact_resume_of
from mmgfp.engine.initial_weights import weights_lacking
from mmgfp.engine.progress import Progress
from mmgfp.engine.refitting import check_refitting, step_and_refit
from mmgfp.engine.registry import HOOKS
from mmgfp.engine.runner_access import (
    averaged_models,
    check_model_wrapper,
    check_not_compiled,
    loss_scale,
    optimizer_of,
    rewrap_model,
    unwrap_model,
)
from mmgfp.engine.saving import save_compact
from mmgfp.engine.train_scope import during_training, told_in_log
from mmgfp.pruner import ChannelPruner, PruneStep, require_fisher
from mmgfp.selection.targets import Target
from mmgfp.surgery.fit import check_shapes
from mmgfp.surgery.live import check_optimizer
from mmgfp.surgery.structure import STRUCTURE_KEY
from mmgfp.utils.errors import ConfigError, MMGFPError, StructureError

#: The key under which training checkpoints hold the state of pruning.
STATE_KEY = 'pruner'
NOT_PRUNED = (
    'give a checkpoint of that model; one that was cut down goes with the config that '
    'tools/deploy_pruned.py writes'
)


@HOOKS.register_module()
class ChannelPruningHook(Hook):
    """Prunes the runner's model while it trains.

    An entry in ``custom_hooks`` is all that a config needs. At each target a
    checkpoint ``<config>_<target>.pth`` with compact weights and their structure is
    written to the work directory, with a report on the run so far (``report.html``);
    at the last one the run stops.

    Args:
        config: Options of the run; those of `PruningConfig.for_runner` if None.
        **options: Options by name, see `PruningConfig`; they override ``config``.

    Attributes:
        pruner: The pruner; None until the first batch has been seen.

    Raises:
        ConfigError: If an option is unknown or out of range.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import mmgfp
        >>> options = dict(interval=10, target=dict(flops=0.5), normalize='memory')
        >>> hook = HOOKS.build(dict(type='ChannelPruningHook', **options))
        >>> hook.config.targets
        (Target(cost='flops', ratio=0.5),)
    """

    #: Masks are applied again before anything else sees the weights of a step.
    priority = 'HIGH'

    def __init__(
        self,
        config: PruningConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.config = PruningConfig.for_runner(config, **options)
        self.pruner: ChannelPruner | None = None
        self.progress: Progress | None = None
        #: The pruner of the run that is resumed.
        self._resumed: ChannelPruner | None = None
        self._loss_scale = 1.0

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work before anything is loaded; let resuming be exact."""
        check_not_compiled(
            runner,
            'while pruning, which looks into every layer',
            'remove it; the compact model can be compiled for fine-tuning',
        )
        self.close()
        self.pruner = self.progress = self._resumed = None  # of another run
        during_training(runner, lambda: closing(self))
        during_training(runner, lambda: told_in_log(runner.logger))
        resume = exact_resume_of(runner, self.config.interval)
        resume.before_each_checkpoint(self._gather)

    def before_train(self, runner: Runner) -> None:
        """Go on where an interrupted run was, if this one resumes it."""
        check_refitting(runner, self.config)
        if self.config.compact_interval is not None:
            check_model_wrapper(runner)
            check_optimizer(optimizer_of(runner.optim_wrapper))
        pruner, self._resumed = self._resumed, None
        if pruner is None:
            return
        if not is_main_process():
            pruner.criterion.clear()  # the main process has the sums of all
        self._watch(runner, pruner)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Find the coupled channels on the first batch, or the first with boxes."""
        self._loss_scale = loss_scale(runner.optim_wrapper)
        if self.pruner is not None:
            return
        pruner = self._build_pruner(runner)
        calls = BatchCalls(pruner.model, data_batch)
        if broadcast_result(lambda: calls.without_boxes):
            runner.logger.info('a batch without boxes: pruning begins with another')
            return
        discovery = broadcast_result(lambda: self._discover(pruner, calls))
        pruner.attach(discovery_from_dict(discovery, pruner.model))
        progress = self._watch(runner, pruner)
        progress.log_groups(self.config.input_shape or calls.size)

    def _build_pruner(self, runner: Runner) -> ChannelPruner:
        pruner = ChannelPruner(unwrap_model(runner.model), self.config)
        for averaged in averaged_models(runner):
            pruner.track_copy(averaged.module)
        return pruner

    def _discover(self, pruner: ChannelPruner, calls: BatchCalls) -> dict[str, Any]:
        profiles = calls.profile(pruner.model, self.config.input_shape)
        discovery = pruner.discover(calls.loss, calls.forward, calls.images, profiles)
        return discovery_to_dict(discovery)

    def _watch(self, runner: Runner, pruner: ChannelPruner) -> Progress:
        """Start to prune, or to go on with it."""
        self.pruner = pruner
        if pruner.done:
            runner.train_loop.stop_training = True
        self.progress = Progress(runner, pruner)
        return self.progress

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Add to the statistics; prune, log and save when it is time."""
        if self.pruner is None:
            return
        step = step_and_refit(runner, self.pruner, self._loss_scale)
        if step is not None:
            self._after_decision(runner, self.pruner, step)

    def _after_decision(
        self, runner: Runner, pruner: ChannelPruner, step: PruneStep
    ) -> None:
        assert self.progress is not None
        self.progress.log_step(step)
        for target in step.reached:
            save_compact(runner, pruner, target.label, runner.iter + 1, step.importance)
        if pruner.done:
            runner.logger.info('all pruning targets are reached; the run stops')
            runner.train_loop.stop_training = True
            return
        if self._compacts_now(pruner):
            optimizer = optimizer_of(runner.optim_wrapper)
            if pruner.compact_([optimizer]):
                rewrap_model(runner)
                runner.logger.info('the pruned units are cut out of the model')

    def _compacts_now(self, pruner: ChannelPruner) -> bool:
        """Return whether `compact_interval` iterations ended since the last decision.

        The iteration alone tells, so that resumed runs cut at the same ones.
        """
        interval = self.config.compact_interval
        if interval is None:
            return False
        before = pruner.iteration - self.config.interval
        return pruner.iteration // interval > before // interval

    def after_train(self, runner: Runner) -> None:
        """Say so and save the model as it is, if the schedule ended too early."""
        if self.pruner is None or self.progress is None:
            return
        if not self.pruner.done:
            target = self.pruner.pending[0]
            ratio = self.progress.ratio(target)
            runner.logger.warning(
                f'the schedule ended before the target {target.cost}='
                f'{target.ratio:g}; reached {target.cost}={ratio:.4f}. Train longer, '
                f'or set interval or iterations lower, or units_per_step higher, or '
                f'choose a faster schedule'
            )
            reached = Target(target.cost, round(ratio, 4)).label
            save_compact(runner, self.pruner, f'{reached}_unfinished', runner.iter)

    def close(self) -> None:
        """Take all hooks off the model, as at the end of a run, however it ends."""
        for pruner in (self.pruner, self._resumed):
            if pruner is not None:
                pruner.close()

    def _gather(self) -> None:
        """Let the main process, which saves, have the statistics of all."""
        if self.pruner is not None:
            self.pruner.criterion.gather(sum_over_processes(), is_main_process())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let the state of pruning travel with the training checkpoint."""
        if self.pruner is not None:
            checkpoint[STATE_KEY] = self.pruner.state_dict()
            units = self.pruner.units
            if not units.in_model.all():
                checkpoint[STRUCTURE_KEY] = units.in_model_structure().to_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the state of an interrupted run, before its weights are loaded.

        Raises:
            ConfigError: If the checkpoint to resume from is not of a pruning run, or of
                a model with other shapes.
            StructureError: If the weights are compact ones.
        """
        state = checkpoint.get(STATE_KEY) if runner._resume else None
        if state is not None:
            pruner = self._build_pruner(runner)
            pruner.load_state_dict(state, [optimizer_of(runner.optim_wrapper)])
            if not pruner.units.in_model.all():
                rewrap_model(runner)
            self._resumed = pruner
        if runner._resume or STRUCTURE_KEY in checkpoint:
            try:
                self._check_weights(runner, checkpoint)
            except MMGFPError:
                self.close()
                raise
        if runner._resume and state is None:
            raise ConfigError(
                'checkpoint',
                'one of a pruning run',
                'one without its state',
                'to prune these weights, name them in load_from and do not resume',
            )
        warn_of_lacking_weights(runner, checkpoint)

    def _check_weights(self, runner: Runner, checkpoint: dict) -> None:
        kind: type[MMGFPError] = StructureError
        remedy = NOT_PRUNED
        if self._resumed is not None:  # its groups fit, so the configuration is another
            kind, remedy = ConfigError, REMEDY
        model = unwrap_model(runner.model)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        reference = 'as in the model that is pruned'
        check_shapes(checkpoint.get('state_dict', {}), shapes, reference, remedy, kind)


@HOOKS.register_module()
class FisherPruningHook(ChannelPruningHook):
    """A `ChannelPruningHook` by Fisher information, the method of the paper.

    Args:
        config: Options of the run; the defaults if None.
        **options: Options by name, see `PruningConfig`.

    Raises:
        ConfigError: If an option is not valid, or ``criterion`` is another one.
    """

    def __init__(
        self,
        config: PruningConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        require_fisher(self.config, 'ChannelPruningHook')


def warn_of_lacking_weights(runner: Runner, checkpoint: dict) -> None:
    """Say so if ``load_from`` lacks weights: scores of random ones mean nothing."""
    if runner._resume:
        return  # where anything that lacks is an error
    model = unwrap_model(runner.model)
    lacking = weights_lacking(model, checkpoint.get('state_dict', checkpoint))
    if lacking:
        more = f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''
        runner.logger.warning(
            f'load_from must hold all weights of the model that is pruned '
            f'({runner._load_from} has no {lacking[0]} of its shape{more}); these are '
            f'left as they were initialised, unless the model converts them: name the '
            f'checkpoint of this config'
        )
