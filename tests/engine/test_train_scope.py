"""What a run sets for the whole process ends with it, whichever way it ends."""

import io
import logging
import signal
from pathlib import Path

import pytest
from mmengine.runner import Runner
from support.pruning import hooks_on
from support.toy_runner import Call, hook_of, toy_runner

from mmgfp.engine.train_scope import during_training, told_in_log

PRUNING = logging.getLogger('mmgfp')


class Interrupt:
    """Raises an error in the third iteration, once."""

    def __init__(self, error):
        self.error = error

    def __call__(self, runner):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if runner.iter == 2 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize('error', [None, ValueError('bad'), KeyboardInterrupt()])
def test_handler_and_hooks_are_off_after_a_run(tmp_path, default_handler, error):
    hooks = [Call(after_train_iter=Interrupt(error))]
    runner, handlers = toy_runner(tmp_path, hooks=hooks), list(PRUNING.handlers)
    if error is not None:
        with pytest.raises(type(error)):
            runner.train()
        assert runner.iter == 2
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert hooks_on(runner.model) == 0 and PRUNING.handlers == handlers
    runner.train()  # the same run goes on, with a pruner of its own
    assert (~hook_of(runner).pruner.units.kept).any()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert hooks_on(runner.model) == 0 and PRUNING.handlers == handlers
    assert 'run' not in vars(runner.train_loop)


def test_request_to_end_does_not_reach_the_next_run(tmp_path, default_handler):
    """SIGTERM in a run that fails in the same iteration."""

    def ask(runner):
        signal.raise_signal(signal.SIGTERM)
        raise ValueError('failed')

    failing = Call(before_train_iter=ask)
    runner = toy_runner(tmp_path, iters=4, hooks=[failing])
    with pytest.raises(ValueError, match='failed'):
        runner.train()
    failing.points.clear()
    runner.train()
    assert runner.iter == 4


def test_runner_that_only_tests_is_left_alone():
    runner = Runner.__new__(Runner)
    runner._train_loop = dict(type='IterBasedTrainLoop')
    during_training(runner, lambda: pytest.fail('entered'))
    assert runner._train_loop == dict(type='IterBasedTrainLoop')


def test_warnings_reach_the_log_file_once(tmp_path):
    def warn(runner):
        PRUNING.warning(f'a warning in iteration {runner.iter}')

    hooks = [Call(before_train_iter=warn)]
    runner = toy_runner(tmp_path, iters=2, hooks=hooks)
    runner.train()
    PRUNING.warning('a warning after the run')
    (path,) = Path(tmp_path, 'work').rglob('*.log')
    text = path.read_text()
    assert [text.count(f'a warning in iteration {n}') for n in (0, 1)] == [1, 1]
    assert 'mmgfp - WARNING - a warning' in text and 'after the run' not in text


@pytest.mark.parametrize('has_console', [False, True])
def test_warnings_are_printed_once(tmp_path, monkeypatch, has_console):
    """By the run's own handler, unless the process has one already."""
    own, console = io.StringIO(), io.StringIO()
    root = [logging.StreamHandler(console)] if has_console else []
    monkeypatch.setattr(logging.getLogger(), 'handlers', root)
    log = logging.Logger('run')
    file = logging.FileHandler(tmp_path / 'run.log')
    log.handlers += [logging.StreamHandler(own), file]
    with told_in_log(log), told_in_log(log):  # a second one adds nothing
        PRUNING.warning('odd')
    file.close()
    printed = own.getvalue(), console.getvalue()
    assert printed == (('', 'odd\n') if has_console else ('odd\n', ''))
    assert (tmp_path / 'run.log').read_text() == 'odd\n'
