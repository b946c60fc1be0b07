"""When to prune, what to log and what to save during a run of MMEngine's runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import (
    all_gather_object,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmgfp.checkpoint import discovery_from_dict, discovery_to_dict
from mmgfp.config import PruningConfig
from mmgfp.engine.artifact import describe, save_artifact
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.checkpoints import write_whole
from mmgfp.engine.distributed import (
    any_of_all,
    check_agreement,
    once_for_all,
    reduction,
)
from mmgfp.engine.hooks.termination import Termination
from mmgfp.engine.progress import Progress
from mmgfp.engine.random_state import random_state, set_random_state
from mmgfp.engine.registry import PRUNERS
from mmgfp.engine.runner_access import (
    averaged_models,
    check_wrapper,
    loss_scale,
    optimizer_of,
    rewrap_model,
    saves_now,
    unwrapped,
)
from mmgfp.pruner import GroupFisherPruner, PruneStep
from mmgfp.selection.targets import Target
from mmgfp.surgery.fit import check_widths
from mmgfp.surgery.live import check_optimizer
from mmgfp.surgery.structure import STRUCTURE_KEY
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check_count

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
        pruner: Which algorithm, and further arguments of it.

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
        pruner: dict | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f'FisherPruningHook.{next(iter(unknown))}',
                'a known argument',
                repr(unknown),
                'use interval, normalize, target, units_per_step, iterations, divisor, '
                'min_channels, max_ratio, keep, coupled, input_shape, strict, '
                'max_nonfinite, statistics_interval, compact_interval or pruner',
            )
        if input_shape is not None and len(input_shape) != 3:
            raise ConfigError(
                'input_shape', '(C, H, W)', repr(input_shape), 'give three numbers'
            )
        if compact_interval is not None:
            check_count('compact_interval', compact_interval)
        self.input_shape = tuple(input_shape) if input_shape else None
        self.compact_interval = compact_interval
        self.config = {
            'type': 'GroupFisherPruner',
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
            **(pruner or {}),
        }
        # Built once without a model, so that bad arguments fail before the run.
        PruningConfig.of({k: v for k, v in self.config.items() if k != 'type'})
        self.pruner: GroupFisherPruner | None = None
        #: What an interrupted run left: the pruner, and the processes' random states.
        self._resumed: tuple[GroupFisherPruner, list[dict[str, Any]]] | None = None
        self._loss_scale = 1.0
        self._termination = Termination()
        self._before_validation: dict[str, Any] | None = None
        self._others: list[dict[str, Any]] = []

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work before anything is loaded; see to safe saving."""
        if runner.cfg.get('compile'):
            raise ConfigError(
                'compile',
                'off while pruning, which looks into every layer',
                repr(runner.cfg.compile),
                'remove it; the compact model can be compiled for fine-tuning',
            )
        write_whole(runner)
        if self._termination not in runner.hooks:
            runner.register_hook(self._termination)

    def before_train(self, runner: Runner) -> None:
        """Go on where an interrupted run was, if this one resumes it."""
        # So that to start an epoch takes nothing from the generator that is restored.
        generator = torch.Generator().manual_seed(runner.seed)
        runner.train_dataloader.generator = generator
        if self.compact_interval is not None:
            check_wrapper(runner)
            check_optimizer(optimizer_of(runner.optim_wrapper))
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return
        pruner, states = resumed
        if not is_main_process():
            pruner.criterion.clear()  # the main process has those of all
        if len(states) == get_world_size():
            set_random_state(states[get_rank()])
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
        if once_for_all(lambda: calls.without_boxes):
            runner.logger.info('a batch without boxes: pruning begins with another')
            return
        found = once_for_all(lambda: self._discover(pruner, calls))
        pruner.attach(discovery_from_dict(found, pruner.model))
        self._watch(runner, pruner)
        self.progress.log_groups(self.input_shape or calls.size)

    def _build(self, runner: Runner) -> GroupFisherPruner:
        pruner = PRUNERS.build({**self.config, 'model': unwrapped(runner.model)})
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
        discovery = pruner.discover(calls.loss, calls.check, calls.images, profiles)
        return discovery_to_dict(discovery)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Gather statistics; prune, log and save when it is time."""
        if self.pruner is None:
            return
        step = self.pruner.step(self._loss_scale, reduction())
        if step is not None:
            self._decided(runner, step)
        self._termination.agreed = self._ends(runner, step)
        if self._termination.agreed or any(saves_now(h, runner) for h in runner.hooks):
            self._gather()

    def _ends(self, runner: Runner, step: PruneStep | None) -> bool:
        """Whether to save and leave after this iteration; see `Termination`.

        Several processes ask each other at decisions only. Gradients that are still
        being accumulated would be lost.
        """
        whole = getattr(runner.optim_wrapper, 'should_update', lambda: True)()
        if not whole or (get_world_size() > 1 and step is None):
            return False
        return any_of_all(self._termination.requested)

    def after_train_epoch(self, runner: Runner) -> None:
        """Get ready for a checkpoint."""
        self._gather()

    def before_val_epoch(self, runner: Runner) -> None:
        """Note the random state, since a resumed run does not validate again."""
        self._before_validation = random_state()

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Get ready for a checkpoint of the best weights."""
        if self._before_validation is not None:
            set_random_state(self._before_validation)
        self._gather()

    def _gather(self) -> None:
        """Let the main process, which saves, have what all have to save."""
        if self.pruner is not None:
            self.pruner.criterion.gather(reduction(), is_main_process())
            self._others = all_gather_object(random_state())[1:]

    def _decided(self, runner: Runner, step: PruneStep) -> None:
        pruner = self.pruner
        assert pruner is not None
        check_agreement(pruner.units.kept)
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
        before = pruner.iteration - pruner.config.interval
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
            state = self.pruner.state_dict()
            checkpoint[STATE_KEY] = {**state, 'random': [random_state(), *self._others]}
            if not self.pruner.units.in_model.all():
                checkpoint[STRUCTURE_KEY] = (
                    self.pruner.units.in_model_structure().to_dict()
                )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the state of an interrupted run, before its weights are loaded.

        Raises:
            ConfigError: If the checkpoint to resume from is not of a pruning run.
            StructureError: If the weights are of another width.
        """
        state = checkpoint.get(STATE_KEY) if runner._resume else None
        if state is not None:
            pruner = self._build(runner)
            pruner.load_state_dict(state, [optimizer_of(runner.optim_wrapper)])
            if not pruner.units.in_model.all():
                rewrap_model(runner)
            self._resumed = pruner, state['random']
        if runner._resume or STRUCTURE_KEY in checkpoint:
            model = unwrapped(runner.model)
            check_widths(
                checkpoint.get('state_dict', {}),
                {name: tensor.shape for name, tensor in model.state_dict().items()},
                'as in the model that is pruned',
                'give a checkpoint of that model, not one that was cut down',
            )
        if runner._resume and state is None:
            raise ConfigError(
                'checkpoint',
                'one of a pruning run',
                'one without its state',
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
            'costs': describe(pruner.units.totals, pruner.units.full),
            'input_shape': self.input_shape,
        }
        structure, model = pruner.units.structure(), pruner.compact()
        averaged = averaged_models(runner)
        if not averaged:
            save_artifact(path, model, structure, meta)
        else:  # as in MMEngine's checkpoints, the averaged weights are those to use
            average = pruner.compact(averaged[0].module)
            save_artifact(path, average, structure, meta, {'source': model})
        runner.logger.info(f'saved the compact model to {path}')
