"""Options that cannot be: refused in one line, by pruner and hook alike."""

import numpy as np
import pytest
import torch
from mmengine.registry import HOOKS
from support.pruning import iterate, prepared
from support.toy_runner import toy_runner
from support.toys import ConvPair, TinyDetector, toy_loss

from mmgfp import ChannelPruner, GroupFisherPruner
from mmgfp.config import PruningConfig
from mmgfp.criteria.base import CRITERIA, Criterion, Scores
from mmgfp.selection.schedules import SCHEDULES, Quota, Schedule
from mmgfp.utils.errors import ConfigError

INF, NAN = float('inf'), float('nan')
WHOLE = r'must be a whole number of at least 1 \(got'
TWO = [dict(flops=0.9), dict(flops=0.5)]
BAD = [
    (dict(intervall=10), "intervall must be .*; did you mean 'interval'"),
    (dict(nonsense=1), 'nonsense must be one of its options: .*; remove it'),
    (dict(interval=0), rf'interval {WHOLE} 0\); change'),
    (dict(interval=2.5), rf'interval {WHOLE} 2\.5'),
    (dict(units_per_step=True), 'units_per_step must be a whole number'),
    (dict(units_per_step=1.5), 'units_per_step must be a whole number'),
    (dict(units_per_step='all'), r"units_per_step .*, or auto \(got 'all'"),
    (dict(divisor=0), r'divisor must be a whole number of at least 1, or auto \(got 0'),
    (dict(iterations=9), r'iterations must be at least the interval .* 10 \(got 9'),
    (dict(iterations=19, target=TWO), r'the interval for each target, 20 \(got 19'),
    (
        dict(iterations=99, units_per_step=2),
        'mutually exclusive .got units_per_step=2 and iterations=99.; keep one',
    ),
    (
        dict(iterations=9, schedule='one_shot'),
        "exclusive .got iterations=9 and schedule='one_shot'.; keep",
    ),
    (dict(schedule='cubik'), "schedule must be one of .*; did you mean 'cubic'"),
    (
        dict(schedule='cubic'),
        "schedule cubic needs iterations .got 'cubic'.; give dict",
    ),
    (
        dict(schedule=dict(type='cubic', iteration=9)),
        "schedule cubic.iteration .*; did you mean 'iterations'",
    ),
    (dict(schedule=dict(iterations=9)), 'schedule must be a name or dict'),
    (dict(schedule=dict(type='auto', share=2)), r'share must be a number in \(0, 1'),
    (dict(criterion='fishr'), "criterion must be one of .*; did you mean 'fisher'"),
    (dict(criterion=3), r'criterion must be a name or dict.*\(got 3'),
    (dict(min_channels=0), f'min_channels {WHOLE} 0'),
    (dict(max_nonfinite=0), f'max_nonfinite {WHOLE} 0'),
    (dict(max_ratio=0), r'max_ratio must be a number in \(0, 1\] \(got 0'),
    (dict(max_ratio='1'), r"max_ratio must be a number in \(0, 1\] \(got '1'"),
    (dict(normalize='latncy'), r"normalize must be one of .*none \(got 'latncy'"),
    (dict(target='flops'), "target must be a dict with one cost .got 'flops'"),
    (dict(target=[]), r'target must be at least one target \(got \[\]'),
    (dict(target=0.5), r'target .*\(got 0\.5\); give one cost .* dict\(flops=0\.5\)'),
    (dict(target={}), r'target must be a dict with one cost \(got {}'),
    (dict(target=dict(flops=0.5, memory=0.5)), 'target must be a dict with one co'),
    (dict(target=dict(speed=0.5)), r"target must be a cost among .*\(got 'speed'"),
    (dict(target=dict(flops=0)), r'target\.flops must be a ratio .* 0 and 1 \(got 0'),
    (dict(target=[dict(flops=2)]), r'target\.flops .* between 0 and 1 \(got 2'),
    (dict(target=dict(params='0.5')), r"target.params must be a ratio .* \(got '0.5'"),
    (dict(target=[dict(flops=0.5), dict(macs=0.5)]), 'flops=0.5 and macs=0.5.; drop'),
    (
        dict(target=[dict(flops=0.5000001), dict(flops=0.5000002)]),
        r'target must be a list of targets that differ, also in the names of their '
        r'files \(got flops=0\.5000001 and flops=0\.5000002\); drop one',
    ),
    (dict(keep='backbone'), r"keep must be a list .* \(got 'backbone'"),
    (dict(keep=None), r'keep must be a list .* \(got None'),
    (dict(coupled='no'), r"coupled must be True or False \(got 'no'"),
    (dict(strict=1), r'strict must be True or False \(got 1'),
    (dict(statistics_interval=0), f'statistics_interval {WHOLE} 0'),
    (dict(statistics_interval=11), 'statistics_interval must be at most .*, 10'),
    (dict(input_shape=(3, 64)), r'input_shape must be \(C, H, W\) \(got \(3, 64\)'),
    (dict(input_shape=5), r'input_shape must be \(C, H, W\) \(got 5'),
    (dict(input_shape=(3, 0, 64)), 'input_shape must be three whole numbers'),
    *(
        (dict(compact_interval=every), f'compact_interval {WHOLE}')
        for every in (0, -1, 2.5, True)
    ),
]


@pytest.mark.parametrize(('options', 'words'), BAD)
def test_bad_options_are_refused_everywhere(options, words):
    """By the object of options, the pruner, and the hook before a run."""
    for build in (
        PruningConfig.of,
        lambda **options: GroupFisherPruner(ConvPair(), **options),
        lambda **options: HOOKS.build(dict(type='FisherPruningHook', **options)),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            build(**options)
        assert '\n' not in str(caught.value)
        assert ';' in str(caught.value)  # the remedy


def test_auto_needs_scores_that_add_up():
    @CRITERIA.register('rank')
    class Rank(Criterion):
        def attach(self, context):
            """Nothing to watch."""

        def scores(self, reduce=None):
            return Scores([])

    try:
        assert PruningConfig(criterion='rank').build_criterion().additive is False
        with pytest.raises(ConfigError, match=r"with the criterion 'rank' \(got Auto"):
            PruningConfig(criterion='rank', units_per_step='auto')
        with pytest.raises(ConfigError, match=r"criterion must be 'fisher' \(got 'ran"):
            GroupFisherPruner(ConvPair(), criterion='rank')
    finally:
        CRITERIA.remove('rank')


@pytest.mark.parametrize(
    'make', [lambda n: [1.0] * n, lambda n: np.ones(n + 1), lambda n: -np.ones(n)]
)
def test_scores_must_be_one_for_each_unit_and_not_negative(make):
    @CRITERIA.register('odd')
    class Odd(Criterion):
        def attach(self, context):
            self.count = len(context.group_of)

        def scores(self, reduce=None):
            return Scores(make(self.count))

    try:
        pruner = ChannelPruner(ConvPair(), criterion='odd', interval=1)
        pruner.prepare(toy_loss, toy_loss, 2)
        with pytest.raises(ConfigError, match='scores of the criterion must be Scores'):
            iterate(pruner)
    finally:
        CRITERIA.remove('odd')


@pytest.mark.parametrize(
    ('scores', 'words', 'gone'),
    [
        ([INF] * 40, ['none of the 40 that are left has a finite score of the'], 0),
        ([INF] * 39 + [1.0], ['none of the 39 that are left has a finite score'], 1),
        ([1.0] * 4 + [INF] * 36, ['units with a finite score may not go; see min_'], 3),
        ([NAN] * 4 + [INF] * 36, ['stem got no gradient in 1', 'none of the 40 th'], 0),
    ],
)
def test_pruner_says_once_that_nothing_can_go(caplog, scores, words, gone):
    """The first four units are those of a group, one of which stays."""

    @CRITERIA.register('given')
    class Given(Criterion):
        def attach(self, context):
            """Nothing to watch."""

        def scores(self, reduce=None):
            return Scores(np.array(scores))

    try:
        pruner = ChannelPruner(TinyDetector(), criterion='given', interval=1)
        pruner.prepare(toy_loss, toy_loss, 2)
        steps = [iterate(pruner) for _ in range(6)]
    finally:
        CRITERIA.remove('given')
    assert (~pruner.units.kept).sum() == gone
    assert [s.exhausted for s in steps] == [False] * gone + [True] * (6 - gone)
    for record, word in zip(caplog.records, words, strict=True):
        assert word in record.message


def test_schedule_may_let_nothing_go(caplog):
    @SCHEDULES.register('pause')
    class Pause(Schedule):
        def quota(self, point):
            return Quota(units=point.iteration % 2)

    try:
        pruner = prepared(ConvPair(), interval=1, schedule='pause')
        steps = [iterate(pruner) for _ in range(4)]
    finally:
        SCHEDULES.remove('pause')
    assert [len(s.units) for s in steps] == [1, 0, 1, 0]
    assert not any(s.exhausted for s in steps) and not caplog.records


def test_what_is_printed_is_one_short_line():
    pruner = prepared(ConvPair(), interval=1)
    step, grouping = iterate(pruner), pruner.units.grouping
    assert repr(grouping) == 'Grouping(1 groups, 6 units, 1 frozen layers)'
    assert repr(pruner.discovery) == f'Discovery(grouping={grouping})'
    group = 'ChannelGroup(conv1, 6 units, '
    assert repr(grouping.groups[0]).startswith(group)
    assert repr(pruner.units.structure()).startswith('PruneStructure(')
    assert repr(step).startswith('PruneStep(1 units, totals=')
    for thing in (pruner.units.structure(), step, *grouping.groups[0].members):
        assert len(repr(thing)) < 200 and '\n' not in repr(thing)


def test_config_must_be_a_config():
    with pytest.raises(ConfigError, match=r'^config must be a PruningConfig or .* 5'):
        ChannelPruner(ConvPair(), 5)


def test_two_resume_hooks_are_refused(tmp_path):
    hooks = [dict(type='mmgfp.ExactResumeHook')] * 2
    runner = toy_runner(tmp_path)
    for hook in hooks:
        runner.register_hook(dict(hook))
    with pytest.raises(ConfigError, match=r'one ExactResumeHook \(got two\); drop'):
        runner.train()


def test_closed_pruner_leaves_no_hooks_behind_a_compact_copy():
    pruner = prepared(ConvPair())
    pruner.close()
    pruner.compact()
    modules = list(pruner.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_pruner_that_is_not_prepared_says_so():
    pruner = GroupFisherPruner(ConvPair())
    for act in (pruner.step, pruner.compact, pruner.state_dict, pruner.compact_):
        with pytest.raises(ConfigError, match='not prepared; call prepare first'):
            act()


def test_compile_in_the_config_is_refused_in_one_line(tmp_path):
    runner = toy_runner(tmp_path, cfg=dict(compile=True))
    with pytest.raises(ConfigError) as caught:
        runner.train()
    assert str(caught.value) == (
        'compile must be off while pruning, which looks into every '
        'layer (got True); remove it; the compact model can be compiled for fine-tuning'
    )


@pytest.mark.parametrize('in_place', [False, True])
def test_compiled_modules_are_refused_in_one_line(in_place):
    model = ConvPair()
    if in_place:
        model.compile()
    else:
        model = torch.compile(model)
    with pytest.raises(ConfigError) as caught:
        GroupFisherPruner(model)
    assert str(caught.value) == (
        'model must be a module without torch.compile, as pruning looks into every '
        'layer (got a compiled ConvPair); prune first; the compact model can be '
        'compiled for fine-tuning'
    )
