"""How long a pruning run still takes, in its own lines and in those of MMEngine."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.logging import MessageHub

from mmgfp.config import PruningConfig
from mmgfp.engine import progress as module
from mmgfp.engine.progress import Progress, counts_text
from mmgfp.groups import ChannelGroup, Grouping, Member, ResidualBlock


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, 'time', SimpleNamespace(time=lambda: clock.now))
    return clock


def started(**options):
    """The progress of a run whose MACs are `share` of the full ones."""
    config = PruningConfig(target=dict(flops=0.5), **options)
    state = SimpleNamespace(share=1.0)
    totals = SimpleNamespace(ratio=lambda cost, full: state.share)
    pruner = SimpleNamespace(
        config=config,
        iteration=0,
        pending=config.targets,
        units=SimpleNamespace(totals=totals, full=None),
    )
    runner = SimpleNamespace(hooks=[], message_hub=MessageHub('eta'))
    runner.register_hook = runner.hooks.append
    return Progress(runner, pruner), pruner, state


def shown(progress):
    """The time left that MMEngine's logger would show; it says 1000 s itself."""
    runner = progress.runner
    [hook] = runner.hooks
    runner.message_hub.update_info('eta', 1000.0)
    hook.after_train_iter(runner)
    return runner.message_hub.runtime_info.get('eta')


@pytest.mark.parametrize(
    ('options', 'left'),
    [
        # After 50 iterations in 10 s, 150 more; a tenth of the way to the target.
        (dict(iterations=200), 30.0),
        (dict(schedule=dict(type='cubic', iterations=100)), 10.0),
        (dict(units_per_step=7), 90.0),
    ],
)
def test_time_left_is_that_to_the_target(options, left, clock):
    progress, pruner, state = started(**options)
    clock.now = 5.0
    assert progress.seconds_left is None and shown(progress) is None
    clock.now, pruner.iteration, state.share = 10.0, 50, 0.95
    progress._estimate(exhausted=False)
    assert progress.seconds_left == pytest.approx(left)
    clock.now = 14.0  # on the way to the next decision
    assert shown(progress) == pytest.approx(left - 4)
    progress._estimate(exhausted=True)  # nothing more may go
    assert progress.seconds_left is None and shown(progress) is None
    pruner.pending = ()
    progress._estimate(exhausted=False)
    assert shown(progress) == 0


@pytest.mark.parametrize(
    ('blocks', 'kept', 'gone', 'expected'),
    [
        # Two groups of 3 and 2 units; both units of the second are in the block.
        (0, [1, 1, 0, 1, 0], [2, 4], ('2 units', '3')),
        (1, [1, 1, 0, 1, 1, 1], [2], ('1 unit and 0 blocks', '4 of 5 units and 1 of')),
        (1, [1, 1, 0, 0, 0, 0], [3, 4, 5], ('2 units and 1 block (b0)', '2 of 5 ')),
        (2, [1, 1, 1, 0, 0, 0, 1], [3, 4, 5], ('2 units and 1 block (b0)', '3 of 5 ')),
    ],
)
def test_units_and_blocks_are_counted_apart(blocks, kept, gone, expected):
    entries = {'a': np.zeros((3, 1), int), 'b': np.zeros((2, 1), int)}
    members = (Member(name, 0, index, 'out') for name, index in entries.items())
    groups = tuple(ChannelGroup(member.name, (member,)) for member in members)
    found = tuple(ResidualBlock(f'b{i}', f'b{i}.bn') for i in range(blocks))
    units = SimpleNamespace(
        grouping=Grouping(groups, (), {}, found), kept=np.array(kept, bool)
    )
    pruned, left = counts_text(units, np.array(gone))
    assert pruned == expected[0] and left.startswith(expected[1])
    if blocks:
        number = sum(kept[5:])
        assert left.endswith(f'and {number} of {blocks} block{"s" * (blocks > 1)}')


def test_another_run_of_the_runner_is_shown_by_the_same_hook(clock):
    progress, pruner, _ = started()
    again = Progress(progress.runner, pruner)
    [hook] = progress.runner.hooks
    assert hook.progress is again


def test_the_hook_is_between_timer_and_logger(pruning_run):
    names = [type(hook).__name__ for hook in pruning_run.runner.hooks]
    order = [names.index(n) for n in ('IterTimerHook', 'TimeToTarget', 'LoggerHook')]
    assert order == sorted(order)
