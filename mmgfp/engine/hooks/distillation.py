"""Distillation in a run of MMEngine's runner: a teacher's outputs add to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmgfp.engine.distillation.adapters import Adapters
from mmgfp.engine.distillation.outputs import Call, Subject, check_alike, subject_of
from mmgfp.engine.distillation.teacher import build_teacher, check_same_images
from mmgfp.engine.hooks.pruning import ChannelPruningHook
from mmgfp.engine.registry import HOOKS
from mmgfp.engine.runner_access import check_not_compiled, optimizer_of, unwrap_model
from mmgfp.engine.train_scope import during_training
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.module_hooks import ModuleHook
from mmgfp.utils.registry import check_known
from mmgfp.utils.trial_runs import undisturbed
from mmgfp.utils.validation import check

#: The key under which training checkpoints hold the adapters of features.
STATE_KEY = 'distillation'
#: Why features are compared in fine-tuning only.
FEATURES_GO = 'the channels of features go while a model is pruned'
#: Factors of the terms: classes, boxes, and features of the neck.
WEIGHTS = {'cls': 1.0, 'bbox': 1.0, 'feat': 1.0}


@HOOKS.register_module()
class DistillationHook(Hook):
    """Lets a model learn from the unpruned one while it is fine-tuned, or pruned.

    An entry in ``custom_hooks`` is all that a config needs. The model, its class and
    the keys of its checkpoints stay as they are. Terms of the loss appear in the log as
    ``loss_distill_cls``, ``loss_distill_bbox``, ``loss_distill_feat``; those of a
    two-stage detector as ``loss_distill_rpn_cls`` and so on.

    Args:
        checkpoint: Weights of the teacher, a file or an address.
        teacher: Its config: a file, or a dict with ``model``; by default the model of
            the run as it was before pruning.
        temperature: Temperature of softmaxes, of class logits and of distributions.
        weights: Factors of the terms ``cls``, ``bbox`` and ``feat``, 1 by default; 0
            leaves a term out.

    Attributes:
        teacher: The teacher; None before training.

    Raises:
        ConfigError: If an option is out of range.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import mmgfp
        >>> options = dict(checkpoint='epoch_12.pth', weights=dict(bbox=0.5))
        >>> hook = HOOKS.build(dict(type='DistillationHook', **options))
        >>> hook.weights
        {'cls': 1.0, 'bbox': 0.5, 'feat': 1.0}
    """

    #: After the hooks that run the model for a look at it before an iteration.
    priority = 'LOW'

    def __init__(
        self,
        checkpoint: str,
        teacher: str | Mapping[str, Any] | None = None,
        temperature: float = 4.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        check('checkpoint', isinstance(checkpoint, str), 'a file', checkpoint)
        is_config = teacher is None or isinstance(teacher, str | Mapping)
        check('teacher', is_config, 'a config or its file', teacher)
        is_number = isinstance(temperature, int | float) and temperature > 0
        check('temperature', is_number, 'a number above 0', temperature)
        check_known('weights', weights or {}, WEIGHTS)
        self.weights = {**WEIGHTS, **(weights or {})}
        for name, value in self.weights.items():
            is_number = isinstance(value, int | float) and value >= 0
            check(f'weights.{name}', is_number, 'a number of at least 0', value)
        check('weights', any(self.weights.values()), 'above 0 for some term', weights)
        self._asks_for_features = bool((weights or {}).get('feat'))
        self._checkpoint, self._config = checkpoint, teacher
        self._temperature = temperature
        self._reset()

    def _reset(self) -> None:
        self.teacher: nn.Module | None = None
        self._subject: Subject | None = None
        self._adapters: Adapters | None = None
        self._runner: Runner | None = None
        self._handles: list[Any] = []
        self._calls: dict[str, Call] = {}
        self._trains = self._prunes = False
        self._compares_features = self.weights['feat'] > 0
        self._said: set[str] = set()

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            ConfigError: If the model is compiled, or features cannot be compared.
        """
        self.close()
        self._reset()
        why = 'with a DistillationHook, which looks into the model'
        check_not_compiled(runner, why, 'remove one of them')
        self._prunes = any(isinstance(h, ChannelPruningHook) for h in runner.hooks)
        if self._prunes:
            if self._asks_for_features:
                raise ConfigError(
                    'weights.feat',
                    f'0 beside a pruning hook, as {FEATURES_GO}',
                    repr(self.weights['feat']),
                    'compare features in fine-tuning',
                )
            self._compares_features = False
        during_training(runner, lambda: closing(self))

    def before_train(self, runner: Runner) -> None:
        """Build the teacher and start to look at the model's outputs."""
        model = unwrap_model(runner.model)
        device = next(model.parameters()).device
        with undisturbed(model):  # the random state is that of a run without a teacher
            self.teacher = build_teacher(runner.cfg, self._config, self._checkpoint)
        self.teacher.to(device)
        check_same_images(model, self.teacher)
        self._runner = runner
        outputs = self.weights['cls'] > 0 or self.weights['bbox'] > 0
        self._subject = subject_of(model, self.teacher, self._temperature, outputs)
        self._handles = [
            model.register_forward_hook(
                ModuleHook(model, self._add_terms), with_kwargs=True
            )
        ]
        modules = dict(model.named_modules())
        watched = [name for name in self._subject.watched if name in modules]
        for name in watched:
            self._watch(name, modules[name])
        if not self._compares_features and self._prunes and 'neck' in watched:
            self._say(runner, f'features are not compared: {FEATURES_GO}')
        self._say_left_out()

    def _watch(self, name: str, module: nn.Module) -> None:
        def note(args: Any, kwargs: Any, output: Any) -> None:
            if self._trains and torch.is_grad_enabled():
                self._calls[name] = Call(args, output)

        hook = ModuleHook(module, note)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Count calls of the model from now on, as they train it."""
        self._trains = True

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Count no calls any more: what comes next is no training."""
        self._trains = False
        self._calls.clear()

    def _add_terms(self, args: Any, kwargs: Any, losses: Any) -> dict | None:
        """Return the model's losses with those of distillation beside them."""
        calls, self._calls = self._calls, {}
        is_loss = kwargs.get('mode') == 'loss' and torch.is_grad_enabled()
        if not (self._trains and is_loss) or self._subject is None:
            return None
        inputs = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        comparison = self._subject.compare(inputs, calls)
        terms = comparison.terms
        if self._compares_features and comparison.features and 'neck' in calls:
            ours = list(calls['neck'].output)
            terms['feat'] = self._compare_features(ours, comparison.features)
        self._say_left_out()
        weighted = {n: self.weights[n.rpartition('_')[2]] * t for n, t in terms.items()}
        return losses | {
            f'loss_distill_{name}': term
            for name, term in weighted.items()
            if self.weights[name.rpartition('_')[2]]
        }

    def _compare_features(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        sizes = [[tuple(f.shape[2:]) for f in features] for features in (theirs, ours)]
        check_alike('sizes of features of the teacher', *reversed(sizes))
        if self._adapters is None:
            assert self._runner is not None
            pairs = zip(ours, theirs, strict=True)
            widths = [(a.shape[1], b.shape[1]) for a, b in pairs]
            optimizer = optimizer_of(self._runner.optim_wrapper)
            self._adapters = Adapters(widths, optimizer, ours[0].device)
        return self._adapters.distance(ours, theirs)

    def _say_left_out(self) -> None:
        assert self._subject is not None and self._runner is not None
        for reason in self._subject.left_out:
            self._say(self._runner, reason)

    def _say(self, runner: Runner, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            runner.logger.warning(f'distillation: {reason}')

    def close(self) -> None:
        """Take all hooks off the model, as at the end of a run, however it ends."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._calls.clear()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let the adapters of features travel with the training checkpoint."""
        adapters = self._adapters
        checkpoint[STATE_KEY] = None if adapters is None else adapters.to_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on with the adapters of an interrupted run.

        Raises:
            ConfigError: If they are damaged or of another version.
        """
        if not runner._resume:
            return
        if STATE_KEY not in checkpoint:
            self._say(runner, 'the checkpoint is of a run without a DistillationHook')
        elif checkpoint[STATE_KEY] is not None:
            # Before its state is loaded, the optimizer must have their parameters.
            optimizer = optimizer_of(runner.optim_wrapper)
            device = next(runner.model.parameters()).device
            state = checkpoint[STATE_KEY]
            self._adapters = Adapters.from_dict(state, optimizer, device)
