"""A run that is killed or asked to end goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgfp.engine.checkpoints import checkpoint_is_due, save_atomically
from mmgfp.engine.distributed import any_of_all
from mmgfp.engine.hooks.termination import Termination
from mmgfp.engine.random_state import random_state, set_random_state
from mmgfp.engine.registry import HOOKS
from mmgfp.engine.runner_access import is_accumulating
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check_count

#: The key under which training checkpoints hold the state of this hook.
STATE_KEY = 'exact_resume'
#: Version of that state.
VERSION = 1


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Lets a resumed run end with the weights of an uninterrupted one, bit for bit.

    Works in any run of MMEngine's runner, with pruning or without. Checkpoints are
    written whole or not at all and hold the random states of all processes; after
    SIGTERM the run saves and leaves with status 143. Resume as usual, with
    ``resume=True`` in the config or with ``--resume``.

    Args:
        agree_interval: Iterations after which several processes ask each other whether
            one of them got SIGTERM; a single process looks after each iteration.

    Raises:
        ConfigError: If the interval is not a whole number of at least 1.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import mmgfp
        >>> hook = HOOKS.build(dict(type='ExactResumeHook', agree_interval=5))
        >>> hook.agree_interval, hook.priority
        (5, 'LOW')
    """

    #: After the hooks that change the model, before the one that writes checkpoints.
    priority = 'LOW'

    def __init__(self, agree_interval: int = 10) -> None:
        check_count('agree_interval', agree_interval)
        self.agree_interval = agree_interval
        self._termination = Termination()
        self._before_checkpoint: list[Callable[[], None]] = []
        self._before_validation: dict[str, Any] | None = None
        #: Random states of all processes but the main one.
        self._other_states: list[dict[str, Any]] = []
        #: Random states of all processes of the run that is resumed.
        self._resumed_states: list[dict[str, Any]] | None = None

    def before_each_checkpoint(self, callback: Callable[[], None]) -> None:
        """Have all processes call ``callback`` before a checkpoint may be written.

        MMEngine saves in the main process only, where nothing can be asked of the
        others any more. Hooks whose state differs between processes gather it here.
        """
        if callback not in self._before_checkpoint:
            self._before_checkpoint.append(callback)

    def before_run(self, runner: Runner) -> None:
        """Have checkpoints written whole, and start to listen for SIGTERM."""
        if sum(isinstance(hook, ExactResumeHook) for hook in runner.hooks) > 1:
            raise ConfigError(
                'custom_hooks', 'with one ExactResumeHook', 'two', 'drop one'
            )
        save_atomically(runner)
        if self._termination not in runner.hooks:
            runner.register_hook(self._termination)

    def before_train(self, runner: Runner) -> None:
        """Restore the random state of this process, if the run is resumed."""
        # The loader draws a seed at each start of an epoch. With a generator of its own
        # it takes nothing from the one that is restored.
        generator = torch.Generator().manual_seed(runner.seed)
        runner.train_dataloader.generator = generator
        states, self._resumed_states = self._resumed_states, None
        if states is None:
            return
        if len(states) == get_world_size():
            set_random_state(states[get_rank()])
        else:
            runner.logger.warning(
                f'the checkpoint is of {len(states)} processes, this run has '
                f'{get_world_size()}: random states start anew'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Get ready for a checkpoint, if one is due or the run is asked to end."""
        self._termination.agreed = self._all_agree_to_end(runner)
        if self._termination.agreed or checkpoint_is_due(runner):
            self._gather()

    def _all_agree_to_end(self, runner: Runner) -> bool:
        """Return whether to save and leave after this iteration; see `Termination`."""
        asks_now = get_world_size() == 1 or self.every_n_train_iters(
            runner, self.agree_interval
        )
        # No checkpoint holds gradients that are still being accumulated.
        if not asks_now or is_accumulating(runner.optim_wrapper):
            return False
        return any_of_all(self._termination.requested)

    def after_train_epoch(self, runner: Runner) -> None:
        """Get ready for a checkpoint of the epoch."""
        self._gather()

    def before_val(self, runner: Runner) -> None:
        """Note the random state, since a resumed run does not validate again."""
        self._before_validation = random_state()

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Restore the random state; get ready for a checkpoint of the best weights."""
        if self._before_validation is not None:
            set_random_state(self._before_validation)
        self._gather()

    def _gather(self) -> None:
        """Give the main process, which saves, what it has to save of all others."""
        for callback in self._before_checkpoint:
            callback()
        self._other_states = all_gather_object(random_state())[1:]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the random states of all processes to the checkpoint."""
        checkpoint[STATE_KEY] = {
            'version': VERSION,
            'random_states': [random_state(), *self._other_states],
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Read the state of the run that is resumed.

        Raises:
            ConfigError: If the state is of another version.
        """
        if not runner._resume:
            return
        state = checkpoint.get(STATE_KEY)
        if state is None:
            runner.logger.warning(
                'the checkpoint was written without ExactResumeHook: random states '
                'start anew'
            )
            return
        if state.get('version') != VERSION:
            raise ConfigError(
                f'checkpoint: {STATE_KEY}.version',
                str(VERSION),
                repr(state.get('version')),
                'resume with the version of mmgfp that the run was started with',
            )
        self._resumed_states = state['random_states']


def exact_resume_of(runner: Runner, agree_interval: int) -> ExactResumeHook:
    """Return the runner's `ExactResumeHook`; register one where there is none.

    To be called in `before_run` of a hook that comes before it.

    Args:
        runner: The runner.
        agree_interval: The argument of a new one.
    """
    hooks = [hook for hook in runner.hooks if isinstance(hook, ExactResumeHook)]
    if not hooks:
        hooks = [ExactResumeHook(agree_interval=agree_interval)]
        runner.register_hook(hooks[0])
        # The runner passes it by if it comes before the hook that is being called.
        hooks[0].before_run(runner)
    return hooks[0]
