"""`recover=True`: pruned units come back with their old weights, and runs still end."""

import copy
import io

import numpy as np
import pytest
import torch
from support.toys import (
    DepthWise,
    ResidualPair,
    SharedHead,
    TinyDetector,
    images,
    square_loss,
    toy_loss,
)

from mmgfp import ChannelPruner
from mmgfp.criteria.base import CRITERIA, Criterion, Scores
from mmgfp.selection.costs import CostTable, LayerProfile
from mmgfp.selection.greedy import Limits
from mmgfp.selection.recovery import kept_after
from mmgfp.selection.schedules import DecisionPoint
from mmgfp.selection.targets import Target
from mmgfp.surgery.aside import values_aside
from mmgfp.utils.errors import ConfigError


@CRITERIA.register('scripted')
class Scripted(Criterion):
    """Scores that a test gives, one row for each decision."""

    scores_pruned = True
    rows: list = []

    def attach(self, context):
        self.count = len(context.group_of)

    def scores(self, reduce=None):
        row = Scripted.rows.pop(0) if Scripted.rows else np.arange(self.count)
        return Scores(np.asarray(row, dtype=float))


def ready(model, loss=toy_loss, **options):
    pruner = ChannelPruner(model, **{'interval': 1, 'recover': True, **options})
    pruner.prepare(loss, loss, 2)
    return pruner


def iterate(pruner, optimizer=None, seed=0):
    """One iteration on random images; the step of the pruner."""
    pruner.model.zero_grad()
    x = images(2, 8, seed).to(pruner.model.stem.weight)
    square_loss(pruner.model(x)).backward()
    if optimizer is not None:
        optimizer.step()
    return pruner.step()


def outputs(model):
    x = images(2).to(model.stem.weight)
    result = model.eval()(x)
    model.train()
    return result if isinstance(result, tuple) else (result,)


def assert_compact_computes_the_same(pruner, copied=None):
    masked = outputs(pruner.model if copied is None else copied)
    for one, two in zip(masked, outputs(pruner.compact(copied)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# -- a unit returns ------------------------------------------------------------


def scripted_return():
    """A shared head that loses unit 0 of stem, then unit 1 in its place and more.

    Groups: 6 units of stem, 8 of both levels, 5 of tower.
    """
    first = np.ones(19)
    first[0] = 0.1
    second = np.ones(19)
    second[[1, 2]] = 0.1
    second[0] = 5
    Scripted.rows = [first, second]
    torch.manual_seed(0)
    model = SharedHead()
    average = copy.deepcopy(model)
    for parameter in average.parameters():
        parameter.data.mul_(2)
    options = dict(criterion='scripted', normalize='none', target=dict(flops=0.2))
    pruner = ready(model, **options)
    pruner.track_copy(average)
    return pruner, average


def test_unit_returns_with_its_old_weights():
    pruner, average = scripted_return()
    model = pruner.model
    readers = (model.level1, model.level2)
    old = [r.weight.detach().clone() for r in readers]
    old_average = average.level1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    first = iterate(pruner)  # without a step of the optimizer
    assert first.units.tolist() == [0] and first.back.tolist() == []
    assert not model.level1.weight[:, 0].any() and not average.level1.weight[:, 0].any()
    second = iterate(pruner, optimizer)
    assert second.back.tolist() == [0] and second.units.tolist() == [1, 2]
    for reader, before in zip(readers, old, strict=True):
        assert torch.equal(reader.weight[:, 0], before[:, 0])
        assert not reader.weight[:, 1:3].any()
        assert not torch.equal(reader.weight[:, 3], before[:, 3])  # it was trained
    assert torch.equal(average.level1.weight[:, 0], old_average[:, 0])
    assert pruner.units.kept[0] and not pruner.units.kept[[1, 2]].any()
    assert second.totals['macs'] < first.totals['macs']
    for copied in (None, average):
        assert_compact_computes_the_same(pruner, copied)


def test_returned_unit_is_trained_again():
    pruner, _ = scripted_return()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    iterate(pruner), iterate(pruner)
    before = pruner.model.level1.weight[:, :2].clone()
    row = np.ones(19)
    row[[1, 2, 18]] = 0.1, 0.1, 0
    Scripted.rows = [row]
    iterate(pruner, optimizer, seed=1)
    after = pruner.model.level1.weight[:, :2]
    assert (after[:, 0] != before[:, 0]).any() and not after[:, 1].any()


def test_without_recover_nothing_returns():
    Scripted.rows = [np.arange(19), np.arange(19)[::-1].copy()]
    pruner = ready(SharedHead(), criterion='scripted', recover=False, normalize='none')
    assert iterate(pruner).units.tolist() == [0]
    step = iterate(pruner)
    assert step.units.tolist() == [18] and len(step.back) == 0
    assert not pruner.units.kept[0]


# -- runs ----------------------------------------------------------------------

SCHEDULES = {
    'fixed': dict(units_per_step=2),
    'auto': dict(units_per_step='auto'),
    'linear': dict(iterations=12),
    'cubic': dict(schedule=dict(type='cubic', iterations=12)),
    'one_shot': dict(
        schedule='one_shot', target=[dict(flops=0.8), dict(flops=0.6), dict(flops=0.4)]
    ),
    'blocks': dict(iterations=12, divisor=2),
    'local': dict(iterations=12, scope='local'),
    'two costs': dict(iterations=12, target=[dict(flops=0.5), dict(params=0.5)]),
}


def run(model, most=200, pace=None, **options):
    """A run to its targets; the pruner, and whether anything came back."""
    pruner = ready(model, **{'target': dict(flops=0.4), **options})
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    returned, costs = 0, [pruner.units.full['macs']]
    for seed in range(most):
        step = iterate(pruner, optimizer, seed)
        returned += len(step.back)
        costs.append(step.totals['macs'])
        if pace is not None:
            pace(seed + 1, step.totals.ratio('flops', pruner.units.full))
        if pruner.done:
            break
    assert pruner.done and all(a >= b for a, b in zip(costs, costs[1:], strict=False))
    return pruner, returned


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('toy', [TinyDetector, ResidualPair, DepthWise])
def test_every_schedule_ends_at_its_target(name, toy):
    if toy is DepthWise:
        toy = DepthWiseStem
    torch.manual_seed(0)
    pruner, _ = run(toy(), **SCHEDULES[name])
    for target in pruner.config.targets:
        assert target.reached(pruner.units.totals, pruner.units.full)
    assert_compact_computes_the_same(pruner)


class DepthWiseStem(DepthWise):
    @property
    def stem(self):
        return self.expand


def test_units_return_in_an_ordinary_run():
    torch.manual_seed(0)
    _, returned = run(TinyDetector(), units_per_step=2)
    assert returned > 0


def test_linear_pace_is_kept():
    def pace(decision, share):
        assert share <= 1 - 0.6 * decision / 12 + 1e-9

    torch.manual_seed(0)
    run(TinyDetector(), iterations=12, pace=pace)


@pytest.mark.parametrize('options', [{}, dict(divisor=2), dict(scope='local')])
def test_equal_to_false_where_nothing_returns(options):
    """Scores that never change, and importance that is divided by nothing."""
    ends = []
    for recover in (True, False):
        torch.manual_seed(0)
        fixed = dict(criterion='random', units_per_step=2, normalize='none')
        pruner, returned = run(TinyDetector(), recover=recover, **fixed, **options)
        assert returned == 0
        ends.append((pruner.iteration, pruner.units.kept, pruner.model.state_dict()))
    assert ends[0][0] == ends[1][0] and (ends[0][1] == ends[1][1]).all()
    for one, two in zip(ends[0][2].values(), ends[1][2].values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize('criterion', ['fisher', 'taylor', 'l2', 'activation'])
def test_resumed_run_ends_like_the_whole_one(criterion):
    """Stopped with units masked; some of them return later."""
    options = dict(criterion=criterion, interval=2, units_per_step=2)

    def train(pruner, optimizer, seeds):
        back = 0
        for seed in seeds:
            step = iterate(pruner, optimizer, seed)
            back += 0 if step is None else len(step.back)
        return back

    def start():
        torch.manual_seed(0)
        model = TinyDetector()
        pruner = ChannelPruner(model, recover=True, target=dict(flops=0.2), **options)
        return pruner, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    whole, optimizer = start()
    whole.prepare(toy_loss, toy_loss, 2)
    train(whole, optimizer, range(5))
    file = io.BytesIO()
    torch.save(
        [whole.state_dict(), whole.model.state_dict(), optimizer.state_dict()], file
    )
    back = train(whole, optimizer, range(5, 11))
    assert back > 0 or criterion != 'fisher'
    file.seek(0)
    state, weights, momentum = torch.load(file, weights_only=True)
    other, optimizer = start()
    other.load_state_dict(state)
    other.model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    train(other, optimizer, range(5, 11))
    assert (other.units.kept == whole.units.kept).all()
    ends = [p.model.state_dict() for p in (whole, other)]
    asides = [values_aside(p.units.asides)[0] for p in (whole, other)]
    for one, two in (ends, asides):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), name


def test_recover_cannot_be_changed_by_resuming():
    pruner = ready(TinyDetector())
    iterate(pruner)
    state = pruner.state_dict()
    other = ChannelPruner(TinyDetector(), interval=1)
    expected = r'recover must be True \(got False\); resume with the configuration'
    with pytest.raises(ConfigError, match=expected):
        other.load_state_dict(state)
    del state['options']['recover'], state['aside']  # as older versions wrote it
    ChannelPruner(TinyDetector(), interval=1).load_state_dict(state)


# -- the choice ----------------------------------------------------------------


def choose(importance, kept, gone, target=0.1, steps=1):
    """The units that stay of a layer of 4 units and one of 4, at 10 MACs each."""
    from mmgfp.groups import ChannelGroup, Member

    groups = [
        ChannelGroup(n, (Member(f'{n}.weight', 0, np.arange(4).reshape(4, 1), 'out'),))
        for n in 'ab'
    ]
    shapes = {'a.weight': (4, 10), 'b.weight': (4, 10)}
    profile = LayerProfile(macs_positions=1, out_positions=1)
    costs = CostTable(shapes, dict.fromkeys(shapes, profile), groups)
    group_of = np.repeat([0, 1], 4)
    removed = np.bincount(group_of[~kept], minlength=2)
    now, full = costs.totals(removed), costs.totals(np.zeros(2))
    targets = [Target('flops', target)]
    values = np.array(importance, dtype=float)
    point = DecisionPoint(1, 1, now, full, targets, targets, values, kept)
    limits = Limits(np.ones(2, int), np.full(2, steps))
    model = (group_of, costs, limits, 'none')
    return kept_after(np.array(gone), point, *model)


def all_but(*units):
    return ~np.isin(np.arange(8), units)


CHOICES = {
    # Unit 0 was pruned; it is worth more than 1 and 2, of which 1 was to go.
    'returns': ([9, 1, 2, 9, 9, 9, 9, 9], (0,), [1], (1, 2)),
    'from another group': ([9, 8, 8, 8, 1, 2, 9, 9], (0,), [4], (4, 5)),
    'worth least': ([0, 1, 2, 9, 9, 9, 9, 9], (0,), [1], (0, 1)),
    'of equal ones the first': ([1, 1, 1, 9, 9, 9, 9, 9], (0,), [1], (0, 1)),
    'unknown': ([np.nan, 1, 2, 9, 9, 9, 9, 9], (0,), [1], (0, 1)),
    'infinite': ([np.inf, 1, 2, 9, 9, 9, 9, 9], (0,), [1], (1, 2)),
}


@pytest.mark.parametrize(
    'importance, before, gone, after', CHOICES.values(), ids=CHOICES
)
def test_choice(importance, before, gone, after):
    kept = choose(importance, all_but(*before), gone)
    assert np.flatnonzero(~kept).tolist() == list(after)


def test_choice_in_blocks():
    """Two units of a group go at once; the pair of b is worth less than that of a."""
    kept = choose([5, 5, 9, 9, 1, 1, 2, 2], all_but(0, 1), [4, 5], steps=2)
    assert np.flatnonzero(~kept).tolist() == [0, 1, 4, 5]
    kept = choose([5, 5, 4, 4, 1, 1, 2, 2], all_but(0, 1), [4, 5], steps=2)
    assert np.flatnonzero(~kept).tolist() == [2, 3, 4, 5]


# -- refused -------------------------------------------------------------------

REFUSED = {
    'criterion': (
        dict(criterion=dict(type='taylor', of='weights')),
        r'criterion must be one that scores pruned units.*\(got \{.*; use ',
    ),
    'compact_interval': (
        dict(compact_interval=10),
        r'compact_interval must be None where recover .*\(got 10\); drop one',
    ),
    'compensate': (
        dict(compensate='fisher'),
        r"compensate must be 'none' where recover .*\(got 'fisher'\); drop one",
    ),
    'one_shot': (
        dict(schedule='one_shot'),
        r'schedule must be one of several decisions .*\(got one_shot .*\); give it',
    ),
    'a value': (dict(recover=1), r'recover must be True or False \(got 1\)'),
}


@pytest.mark.parametrize('options, message', REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(options, message):
    options = {'recover': True, **options}
    with pytest.raises(ConfigError, match=message) as error:
        ChannelPruner(TinyDetector(), **options)
    assert '\n' not in str(error.value)


def test_a_criterion_of_ones_own_must_say_that_it_scores_pruned_units():
    class Position(Criterion):
        def attach(self, context):
            self.count = len(context.group_of)

        def scores(self, reduce=None):
            return Scores(np.arange(self.count))

    CRITERIA.register('unscored')(Position)
    try:
        with pytest.raises(ConfigError, match='criterion must be one that scores'):
            ChannelPruner(TinyDetector(), criterion='unscored', recover=True)
    finally:
        CRITERIA.remove('unscored')
