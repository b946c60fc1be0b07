"""When to prune, what to log and what to save during a run of MMEngine's runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.config import check_count
from mmgfp.discovery.discover import Discovery
from mmgfp.engine.artifact import costs_in_numbers, save_artifact
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.distributed import (
    broadcast_result,
    check_agreement,
    sum_over_processes,
)
from mmgfp.engine.hooks.exact_resume import ExactResumeHook
from mmgfp.engine.progress import Progress
from mmgfp.engine.registry import HOOKS
from mmgfp.engine.runner_access import (
    averaged_models,
    check_model_wrapper,
    check_weight_shapes,
    loss_scale,
    optimizer_of,
    rewrap_model,
    unwrap_model,
)
from mmgfp.pruner import GroupFisherPruner, PruneStep
from mmgfp.selection.greedy import Target
from mmgfp.surgery.live import check_optimizer
from mmgfp.surgery.structure import STRUCTURE_KEY
from mmgfp.utils.errors import ConfigError

#: The key under which training checkpoints hold the state of pruning.
STATE_KEY = 'pruner'


@HOOKS.register_module()
class FisherPruningHook(Hook):
    """Prunes the runner's model while it trains.

    An entry in ``custom_hooks`` is all that a config needs. At each target a
    checkpoint ``<config>_<target>.pth`` with compact weights and their structure is
    written to the work directory; at the last one the run stops.

    Args:
        interval: Iterations between two decisions (paper: 10 for detection, 25 for
            classification).
        normalize: ``'memory'``, ``'flops'`` or ``'none'``; see `GroupFisherPruner`.
        target: Such as ``dict(flops=0.5)``, a share of the unpruned model's
            multiply-accumulates; a list of such dicts gives several checkpoints.
        units_per_step: Units that go at each decision, or ``'auto'``.
        iterations: Iterations of the run in which the last target is reached, instead
            of ``units_per_step``.
        divisor: Groups that get smaller end at a multiple of so many channels.
        min_channels: Output channels that always stay in each group.
        max_ratio: Largest share of a group that may go.
        keep: Names or patterns of layers that are never pruned.
        coupled: False prunes only channels that a single layer makes and a single one
            reads (paper's -I).
        input_shape: (C, H, W) of the image for which costs are counted; by default
            the size of the first training batch.
        strict: Raise at what cannot be pruned for lack of understanding.
        max_nonfinite: Iterations in a row without finite gradients that end the run.
        statistics_interval: Iterations from one that is watched to the next.
        compact_interval: After so many iterations, at the next decision, what went is
            cut out of the model, its optimizer and its average, so that iterations
            get faster; None only masks it until the end.

    Raises:
        ConfigError: An argument is unknown or out of range.
    """

    #: Masks are applied again before anything else sees the weights of a step.
    priority = 'HIGH'

    def __init__(
        self,
        interval: int = 10,
        normalize: str = 'memory',
        target: dict | Sequence[dict] = {'flops': 0.5},  # noqa: B006
        units_per_step: int | str = 1,
        iterations: int | None = None,
        divisor: int = 1,
        min_channels: int = 1,
        max_ratio: float = 1.0,
        keep: Sequence[str] = (),
        coupled: bool = True,
        input_shape: Sequence[int] | None = None,
        strict: bool = False,
        max_nonfinite: int = 100,
        statistics_interval: int = 1,
        compact_interval: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f'FisherPruningHook.{next(iter(unknown))}',
                'a known argument',
                repr(unknown),
                'use interval, normalize, target, units_per_step, iterations, divisor, '
                'min_channels, max_ratio, keep, coupled, input_shape, strict, '
                'max_nonfinite, statistics_interval or compact_interval',
            )
        if input_shape is not None and len(input_shape) != 3:
            raise ConfigError(
                'input_shape', '(C, H, W)', repr(input_shape), 'give three numbers'
            )
        if compact_interval is not None:
            check_count('compact_interval', compact_interval)
        self.input_shape = tuple(input_shape) if input_shape else None
        self.compact_interval = compact_interval
        self.config: dict[str, Any] = {
            'interval': interval,
            'normalize': normalize,
            'target': target,
            'units_per_step': units_per_step,
            'iterations': iterations,
            'divisor': divisor,
            'min_channels': min_channels,
            'max_ratio': max_ratio,
            'keep': keep,
            'coupled': coupled,
            'strict': strict,
            'max_nonfinite': max_nonfinite,
            'statistics_interval': statistics_interval,
        }
        # Built once without a model, so that bad arguments fail before the run.
        no_model: Any = None
        GroupFisherPruner(no_model, **self.config)
        self.pruner: GroupFisherPruner | None = None
        #: The pruner of the run that is resumed.
        self._resumed: GroupFisherPruner | None = None
        self._loss_scale = 1.0

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work before anything is loaded; let resuming be exact."""
        if runner.cfg.get('compile'):
            raise ConfigError(
                'compile',
                'no torch.compile while pruning, which looks into every layer',
                repr(runner.cfg.compile),
                'remove it; the compact model can be compiled for fine-tuning',
            )
        hooks = [h for h in runner.hooks if isinstance(h, ExactResumeHook)]
        if not hooks:
            hooks = [ExactResumeHook(agree_interval=self.config['interval'])]
            runner.register_hook(hooks[0])
        hooks[0].before_each_checkpoint(self._gather)

    def before_train(self, runner: Runner) -> None:
        """Go on where an interrupted run was, if this one resumes it."""
        if self.compact_interval is not None:
            check_model_wrapper(runner)
            check_optimizer(optimizer_of(runner.optim_wrapper))
        pruner, self._resumed = self._resumed, None
        if pruner is None:
            return
        if not is_main_process():
            pruner.statistics.clear()  # the main process has those of all
        self._watch(runner, pruner)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Find the coupled channels on the first batch, or the first with boxes."""
        self._loss_scale = loss_scale(runner.optim_wrapper)
        if self.pruner is not None:
            return
        pruner = self._build(runner)
        calls = BatchCalls(pruner.model, data_batch)
        if broadcast_result(lambda: calls.without_boxes):
            runner.logger.info('a batch without boxes: pruning begins with another')
            return
        found = broadcast_result(lambda: self._discover(pruner, calls))
        pruner.attach(Discovery.from_dict(found, pruner.model))
        self._watch(runner, pruner)
        self.progress.log_groups(self.input_shape or calls.size)

    def _build(self, runner: Runner) -> GroupFisherPruner:
        pruner = GroupFisherPruner(unwrap_model(runner.model), **self.config)
        for averaged in averaged_models(runner):
            pruner.track_copy(averaged.module)
        return pruner

    def _watch(self, runner: Runner, pruner: GroupFisherPruner) -> None:
        """Start to prune, or to go on with it."""
        self.pruner = pruner
        if pruner.done:
            runner.train_loop.stop_training = True
        self.progress = Progress(runner, pruner)

    def _discover(self, pruner: GroupFisherPruner, calls: BatchCalls) -> dict[str, Any]:
        profiles = calls.profile(pruner.model, self.input_shape)
        return pruner.discover(
            calls.loss, calls.check, calls.images, profiles
        ).to_dict()

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
        step = self.pruner.step(self._loss_scale, sum_over_processes())
        if step is not None:
            self._decided(runner, step)

    def _gather(self) -> None:
        """Let the main process, which saves, have the statistics of all."""
        if self.pruner is not None:
            self.pruner.statistics.gather(sum_over_processes(), is_main_process())

    def _decided(self, runner: Runner, step: PruneStep) -> None:
        pruner = self.pruner
        assert pruner is not None
        check_agreement(pruner.kept)
        self.progress.log_step(step)
        for target in step.reached:
            self._save(runner, target.label)
        if pruner.done:
            runner.logger.info('all pruning targets are reached; the run stops')
            runner.train_loop.stop_training = True
            return
        if not len(step.units):
            runner.logger.warning(
                'no unit was pruned: none has gradients and may go; see min_channels, '
                'max_ratio and keep'
            )
        if self._compacts() and pruner.compact_([optimizer_of(runner.optim_wrapper)]):
            rewrap_model(runner)
            runner.logger.info('what went is cut out of the model')

    def _compacts(self) -> bool:
        """Whether `compact_interval` iterations ended since the decision before.

        The iteration alone tells, so that resumed runs cut at the same ones.
        """
        every, pruner = self.compact_interval, self.pruner
        if every is None or pruner is None:
            return False
        before = pruner.iteration - pruner.interval
        return pruner.iteration // every > before // every

    def after_train(self, runner: Runner) -> None:
        """Say so and save what there is, if the schedule ended too early."""
        if self.pruner is None:
            return
        if not self.pruner.done:
            target = self.pruner.pending[0]
            ratio = self.progress.ratio(target)
            runner.logger.warning(
                f'the schedule ended before the target {target.cost}='
                f'{target.ratio:g}; reached {target.cost}={ratio:.4f}. Train longer, '
                f'or set interval or iterations lower, or units_per_step higher'
            )
            reached = Target(target.cost, round(ratio, 4)).label
            self._save(runner, f'{reached}_unfinished')
        self.pruner.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let the state of pruning travel with the training checkpoint."""
        if self.pruner is not None:
            checkpoint[STATE_KEY] = self.pruner.state_dict()
            if not self.pruner.in_model.all():
                checkpoint[STRUCTURE_KEY] = self.pruner.in_model_structure().to_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the state of an interrupted run, before its weights are loaded.

        Raises:
            ConfigError: The checkpoint to resume from is not of a pruning run, or the
                weights are of another width.
        """
        state = checkpoint.get(STATE_KEY) if runner._resume else None
        if state is not None:
            pruner = self._build(runner)
            pruner.load_state_dict(state, [optimizer_of(runner.optim_wrapper)])
            if not pruner.in_model.all():
                rewrap_model(runner)
            self._resumed = pruner
        if runner._resume or STRUCTURE_KEY in checkpoint:
            check_weight_shapes(
                unwrap_model(runner.model), checkpoint.get('state_dict', {})
            )
        if runner._resume and state is None:
            raise ConfigError(
                'checkpoint',
                'the state of a pruning run to resume',
                'a checkpoint without one',
                'to prune these weights, name them in load_from and do not resume',
            )

    def _save(self, runner: Runner, label: str) -> None:
        """Write ``<config>_<label>.pth`` into the work directory."""
        pruner = self.pruner
        assert pruner is not None
        if not is_main_process():
            return
        filename = runner.cfg.filename
        name = Path(filename).stem if filename else runner.experiment_name
        path = Path(runner.work_dir) / f'{name}_{label}.pth'
        meta = {
            'dataset_meta': getattr(runner.train_dataloader.dataset, 'metainfo', {}),
            'cfg': runner.cfg.pretty_text,
            'iter': runner.iter + 1,
            'costs': costs_in_numbers(pruner.totals, pruner.full),
            'input_shape': self.input_shape,
        }
        structure, model = pruner.structure(), pruner.compact()
        averaged = averaged_models(runner)
        if not averaged:
            save_artifact(path, model, structure, meta)
        else:  # as in MMEngine's checkpoints, the averaged weights are those to use
            average = pruner.compact(averaged[0].module)
            save_artifact(path, average, structure, meta, {'source': model})
        runner.logger.info(f'saved the compact model to {path}')
