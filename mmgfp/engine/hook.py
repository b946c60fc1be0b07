"""When to prune, what to log and what to save during a run of MMEngine's runner."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmgfp.engine.artifact import describe, save_artifact
from mmgfp.engine.inputs import BatchCalls
from mmgfp.engine.registry import PRUNERS
from mmgfp.errors import ConfigError
from mmgfp.pruner import GroupFisherPruner, PruneStep
from mmgfp.selection import Target

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
        units_per_step: Units that go at each decision.
        min_channels: Output channels that always stay in each group.
        max_ratio: Largest share of a group that may go.
        keep: Names or patterns of layers that are never pruned.
        coupled: False prunes only channels that a single layer makes and a single one
            reads (paper's -I).
        input_shape: (C, H, W) of the image for which costs are counted; by default
            the size of the first training batch.
        strict: Raise at what cannot be pruned for lack of understanding.
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
        units_per_step: int = 1,
        min_channels: int = 1,
        max_ratio: float = 1.0,
        keep: Sequence[str] = (),
        coupled: bool = True,
        input_shape: Sequence[int] | None = None,
        strict: bool = False,
        pruner: dict | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f'FisherPruningHook.{next(iter(unknown))}',
                'a known argument',
                repr(unknown),
                'use interval, normalize, target, units_per_step, min_channels, '
                'max_ratio, keep, coupled, input_shape, strict or pruner',
            )
        if input_shape is not None and len(input_shape) != 3:
            raise ConfigError(
                'input_shape', '(C, H, W)', repr(input_shape), 'give three numbers'
            )
        self.input_shape = tuple(input_shape) if input_shape else None
        self.config = {
            'type': 'GroupFisherPruner',
            'interval': interval,
            'normalize': normalize,
            'target': target,
            'units_per_step': units_per_step,
            'min_channels': min_channels,
            'max_ratio': max_ratio,
            'keep': keep,
            'coupled': coupled,
            'strict': strict,
            **(pruner or {}),
        }
        # Built once without a model, so that bad arguments fail before the run.
        PRUNERS.build({**self.config, 'model': None})
        self.pruner: GroupFisherPruner | None = None
        self._resumed: dict[str, Any] | None = None
        self._started = (0.0, 0, 1.0)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Find the coupled channels on the first batch."""
        if self.pruner is not None:
            return
        model = _unwrapped(runner.model)
        pruner = PRUNERS.build({**self.config, 'model': model})
        calls = BatchCalls(model, data_batch)
        work = calls.work(model, self.input_shape)
        grouping = pruner.prepare(calls.loss, calls.forward, calls.images, work)
        self.pruner = pruner
        shape = self.input_shape or calls.size
        runner.logger.info(
            f'pruning {grouping.units} units in {len(grouping.groups)} groups; costs '
            f'are for one image of {shape}: {_costs_text(pruner)}'
        )
        for layer in grouping.frozen:
            runner.logger.info(f'{layer.layer} keeps channels: {layer.reason}')
        if self._resumed is not None:
            pruner.load_state_dict(self._resumed)
            self._resumed = None
        if pruner.done:
            runner.train_loop.stop_training = True
        self._started = (time.time(), runner.iter, self._gap())

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Gather statistics; prune, log and save when it is time."""
        assert self.pruner is not None
        step = self.pruner.step()
        if step is None:
            return
        self._log(runner, step)
        for target in step.reached:
            self._save(runner, target.label)
        if self.pruner.done:
            runner.logger.info('all pruning targets are reached; the run stops')
            runner.train_loop.stop_training = True
        elif not len(step.units):
            runner.logger.warning(
                'no unit is left that may be pruned; see min_channels, max_ratio and '
                'keep'
            )

    def after_train(self, runner: Runner) -> None:
        """Say so and save what there is, if the schedule ended too early."""
        if self.pruner is None:
            return
        if not self.pruner.done:
            target = self.pruner.pending[0]
            ratio = self._ratio(target)
            runner.logger.warning(
                f'the schedule ended before the target {target.cost}='
                f'{target.ratio:g}; reached {target.cost}={ratio:.4f}. Train longer, '
                f'or set interval lower or units_per_step higher'
            )
            reached = Target(target.cost, round(ratio, 4)).label
            self._save(runner, f'{reached}_unfinished')
        self.pruner.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let the state of pruning travel with the training checkpoint."""
        if self.pruner is not None:
            checkpoint[STATE_KEY] = self.pruner.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the state until the first batch shows the channels again."""
        if runner._resume:
            self._resumed = checkpoint.get(STATE_KEY)

    def _ratio(self, target: Target) -> float:
        pruner = self.pruner
        assert pruner is not None
        return float(pruner.totals[target.cost] / pruner.full[target.cost])

    def _gap(self) -> float:
        """How far the last target is, in shares of the full cost."""
        pruner = self.pruner
        assert pruner is not None
        return max((self._ratio(t) - t.ratio for t in pruner.pending), default=0.0)

    def _log(self, runner: Runner, step: PruneStep) -> None:
        pruner = self.pruner
        assert pruner is not None
        scalars = {
            f'pruning/{cost}_{kind}': value
            for cost, kinds in describe(step.totals, pruner.full).items()
            for kind, value in kinds.items()
        }
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        runner.logger.info(
            f'pruned {len(step.units)} units, {int(pruner.alive.sum())} left: '
            f'{_costs_text(pruner)}, eta to the target {self._eta(runner)}'
        )

    def _eta(self, runner: Runner) -> str:
        """Time to the last target at the pace so far."""
        started, first, gap = self._started
        covered = gap - self._gap()
        if covered <= 0:
            return 'unknown'
        seconds = (time.time() - started) * self._gap() / covered
        return str(datetime.timedelta(seconds=int(seconds)))

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
            'costs': describe(pruner.totals, pruner.full),
            'input_shape': self.input_shape,
        }
        save_artifact(path, pruner.compact(), pruner.structure(), meta)
        runner.logger.info(f'saved the compact model to {path}')


def _unwrapped(model: Any) -> Any:
    return model.module if is_model_wrapper(model) else model


def _costs_text(pruner: GroupFisherPruner) -> str:
    units = {'macs': ('MACs', 'G', 1e9), 'memory': ('memory', 'M elements', 1e6)}
    units['params'] = ('params', 'M', 1e6)
    costs = describe(pruner.totals, pruner.full)
    return ', '.join(
        f'{label} {costs[key]["left"] / scale:.4g} {unit} ({costs[key]["ratio"]:.1%})'
        for key, (label, unit, scale) in units.items()
    )
