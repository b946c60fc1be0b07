"""Single weights of a runner's model are set to zero while it trains."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmgfp.engine.distributed import check_agreement
from mmgfp.engine.hooks.exact_resume import exact_resume_of
from mmgfp.engine.hooks.pruning import ChannelPruningHook
from mmgfp.engine.registry import HOOKS
from mmgfp.engine.runner_access import (
    averaged_models,
    check_model_wrapper,
    check_not_compiled,
    optimizer_of,
    rewrap_model,
    unwrap_model,
)
from mmgfp.engine.train_scope import during_training
from mmgfp.sparsity.config import SparsityConfig, Timetable, timetable
from mmgfp.sparsity.kinds import build_sparsifier
from mmgfp.sparsity.sparsifier import Sparsifier
from mmgfp.surgery.live import MULTIPLE, check_optimizer
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import atomic_write
from mmgfp.utils.registry import check_known

#: The key under which training checkpoints hold masks, and what they rest on; in
#: ``meta``, under the same key, is the density of each layer.
STATE_KEY = 'sparsity'
#: Fewer decisions than this are no gradual course, which leaves layers time to adapt.
FEW = 5
#: The file in the work directory that says how many weights of each layer are left.
REPORT = 'sparsity.json'


@HOOKS.register_module()
class SparsityHook(Hook):
    """Sets weights of the runner's model to zero while it trains.

    An entry in ``custom_hooks`` is all that a config needs. Checkpoints hold ordinary
    weights, which are zero where they should be. Beside a `ChannelPruningHook`, weights
    go once all of its targets are reached: the model is made compact, and the run goes
    on; iterations count from there.

    Args:
        **options: Options by name, see `SparsityConfig`.

    Attributes:
        sparsifier: What holds weights at zero; None before training.

    Raises:
        ConfigError: If an option is unknown or out of range.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import mmgfp
        >>> hook = HOOKS.build(dict(type='SparsityHook', kind='nm'))
        >>> hook.config.n, hook.config.m, hook.config.sr_ste
        (2, 4, True)
    """

    #: After the hook that prunes channels, before the one that averages weights.
    priority = 'ABOVE_NORMAL'

    def __init__(self, **options: Any) -> None:
        check_known('sparsity', options, [f.name for f in fields(SparsityConfig)])
        self.config = SparsityConfig(**options)
        self._reset()

    def _reset(self) -> None:
        self.sparsifier: Sparsifier | None = None
        #: Iterations of the run before those that count here.
        self._start = 0
        self._times: Timetable | None = None
        self._pruning: ChannelPruningHook | None = None
        self._emptied: set[str] = set()

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work before anything is loaded; let resuming be exact.

        Raises:
            ConfigError: If the model is compiled, there are two such hooks, or pruned
                channels could stay in the model.
        """
        self.close()
        self._reset()
        why = 'with a SparsityHook, which changes weights beside the graph'
        check_not_compiled(runner, why, 'remove one of them')
        if sum(isinstance(hook, SparsityHook) for hook in runner.hooks) > 1:
            raise ConfigError(
                'custom_hooks', 'with one SparsityHook', 'two', 'drop one'
            )
        pruning = [h for h in runner.hooks if isinstance(h, ChannelPruningHook)]
        self._pruning = pruning[0] if pruning else None
        if pruning:
            _check_divisor(pruning[0].config.divisor)
        during_training(runner, lambda: closing(self))
        exact_resume_of(runner, self.config.interval)

    def before_train(self, runner: Runner) -> None:
        """Begin, or go on where an interrupted run was."""
        check_model_wrapper(runner, 'beside a SparsityHook', 'leave the hook out')
        optimizer = optimizer_of(runner.optim_wrapper)
        self._times = self._timetable(runner)
        if self.sparsifier is not None:
            self._attach(runner)
            if self._pruning is not None:  # which is done, and would end the run
                runner.train_loop.stop_training = False
        elif self._pruning is None:
            self._begin(runner)
        else:
            check_optimizer(optimizer)

    def _timetable(self, runner: Runner) -> Timetable:
        loop = runner.train_loop
        is_by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if self.config.by_epoch and not is_by_epoch:
            raise ConfigError(
                'by_epoch',
                'False in a run by iterations',
                'True',
                'give begin and end in iterations',
            )
        epoch = len(loop.dataloader) if is_by_epoch else None
        return timetable(self.config, loop.max_iters - self._start, epoch)

    def _begin(self, runner: Runner) -> None:
        """Find the weights that take part."""
        self.sparsifier = self._build(runner)
        for name, reason in self.sparsifier.left_out.items():
            runner.logger.info(f'{name} stays dense: {reason}')
        self._attach(runner)
        assert self._times is not None
        if self.config.schedule != 'one_shot' and self._times.decisions < FEW:
            runner.logger.warning(_few(self._times))
        if self._times.is_due(0):
            self._decide(runner, 0)

    def _build(self, runner: Runner) -> Sparsifier:
        model = unwrap_model(runner.model)
        model.train()  # where many backbones freeze their stages, and nowhere else
        return build_sparsifier(model, self.config)

    def _attach(self, runner: Runner) -> None:
        assert self.sparsifier is not None
        self.sparsifier.attach(optimizer_of(runner.optim_wrapper))
        for averaged in averaged_models(runner):
            self.sparsifier.track_copy(averaged.module)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Set more weights to zero when it is time."""
        if self.sparsifier is None:
            self._begin_if_channels_are_pruned(runner)
            return
        assert self._times is not None
        iteration = runner.iter + 1 - self._start
        if self._times.is_due(iteration):
            self._decide(runner, iteration)
        elif self.sparsifier.begun and iteration % self.config.interval == 0:
            self._check_agreement()  # masks of SR-STE change at each step

    def _begin_if_channels_are_pruned(self, runner: Runner) -> None:
        assert self._pruning is not None
        pruner = self._pruning.pruner
        if pruner is None or not pruner.done:
            return
        if pruner.compact_([optimizer_of(runner.optim_wrapper)]):
            rewrap_model(runner)
        self._start = runner.iter + 1
        self._times = self._timetable(runner)
        runner.train_loop.stop_training = False
        runner.logger.info('the run goes on, for weights of the compact model')
        self._begin(runner)

    def _decide(self, runner: Runner, iteration: int) -> None:
        assert self.sparsifier is not None and self._times is not None
        density = self.config.density_after(self._times.progress(iteration))
        self.sparsifier.decide(density)
        self._check_agreement()
        report = self.sparsifier.report()
        scalars = {'sparsity/density': report['density']}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        runner.logger.info(
            f'{report["kept"]} of {report["weights"]} weights stay '
            f'({report["density"]:.2%})'
        )
        for name, layer in report['layers'].items():
            if not layer['kept'] and name not in self._emptied:
                self._emptied.add(name)
                runner.logger.warning(
                    f"no weight of {name} is left; keep it, or take scope='local'"
                )

    def _check_agreement(self) -> None:
        if get_world_size() > 1:
            assert self.sparsifier is not None
            check_agreement(self.sparsifier.kept_bits())

    def after_train(self, runner: Runner) -> None:
        """Report the density of each layer; say so if the run ended too early."""
        if self.sparsifier is None:
            runner.logger.warning(
                'no weights were set to zero: the run ended before channels were pruned'
            )
            return
        report = self.sparsifier.report()
        for name, layer in report['layers'].items():
            runner.logger.info(f'{name}: {layer["density"]:.2%} of the weights stay')
        assert self._times is not None
        if runner.iter - self._start < self._times.end:
            runner.logger.warning(
                f'the run ended before weights were down to {self.config.density:.2%}: '
                f'{report["density"]:.2%} of them stay'
            )
        if is_main_process():
            text = json.dumps(report, indent=2)
            path = Path(runner.work_dir) / REPORT
            atomic_write(path, lambda tmp: tmp.write_text(text))
            runner.logger.info(f'{report["density"]:.2%} in all; wrote {path}')

    def close(self) -> None:
        """Take the hooks off the optimizer and the weights."""
        if self.sparsifier is not None:
            self.sparsifier.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let masks, and the density of layers, travel with the training checkpoint."""
        state = None
        if self.sparsifier is not None:
            checkpoint['meta'][STATE_KEY] = self.sparsifier.report()
            state = self.sparsifier.state_dict()
        checkpoint[STATE_KEY] = {'start': self._start, 'sparsifier': state}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the masks of an interrupted run.

        Raises:
            ConfigError: If the checkpoint to resume from is of a run without this hook,
                or of another model or other options.
        """
        if not runner._resume:
            return
        if STATE_KEY not in checkpoint:
            raise ConfigError(
                'checkpoint',
                'one of a run with a SparsityHook',
                'one without its state',
                'to begin with these weights, name them in load_from and do not resume',
            )
        state = checkpoint[STATE_KEY]
        if state['sparsifier'] is None:
            return
        self._start = int(state['start'])
        sparsifier = self._build(runner)
        sparsifier.load_state_dict(state['sparsifier'])
        self.sparsifier = sparsifier


def _few(times: Timetable) -> str:
    """Say that weights go in few decisions."""
    often = 'at once' if times.decisions == 1 else f'in {times.decisions} decisions'
    return (
        f'weights go {often}, as interval={times.interval} fits so few into iterations '
        f'{times.begin} to {times.end}: lower it, raise end or train longer for a '
        f"gradual course, or take schedule='one_shot'"
    )


def _check_divisor(divisor: int | str) -> None:
    """Refuse numbers of channels at which a model that trains is not cut.

    Raises:
        ConfigError: If pruned channels could stay in it, masked.
    """
    if isinstance(divisor, str) or divisor % MULTIPLE:
        raise ConfigError(
            'divisor',
            f'a multiple of {MULTIPLE} beside a SparsityHook',
            repr(divisor),
            'change it, or prune channels first and weights while fine-tuning',
        )
