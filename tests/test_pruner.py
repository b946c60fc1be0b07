"""The pruner on plain modules: decisions, masks, state, and what it leaves behind."""

import copy
import gc
import logging
import re
import weakref

import numpy as np
import pytest
import torch
from support.pruning import importance_of, iterate, prepared, seen_by
from support.reference import mask_fisher
from support.states import picked, saved, saved_and_loaded, state_of
from support.toys import (
    TOYS,
    ConvPair,
    GroupConv,
    ResidualPair,
    SharedHead,
    TinyDetector,
    conv,
    images,
    parameters_in,
    reasons_of,
    square_loss,
    toy_loss,
)
from torch import nn

from mmgfp import GroupFisherPruner
from mmgfp.discovery.verify import disagreement
from mmgfp.selection.costs import RunningCosts
from mmgfp.selection.targets import Target
from mmgfp.utils.errors import ConfigError, StatisticsError, TraceError


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.01)


class Run:
    """A model in double precision with batches, an optimizer and a pruner.

    Args:
        toy: Builds the model.
        lr: Learning rate.
        scale: Factor on the loss while the pruner looks on.
        options: Arguments of the pruner.
    """

    def __init__(self, toy=TinyDetector, lr=0.05, scale=1.0, **options):
        torch.manual_seed(0)
        self.model = toy().double()
        self.scale = scale
        self.iteration = 0
        self.optimizer = sgd(self.model, lr)
        self.pruner = GroupFisherPruner(self.model, **options)
        self.pruner.prepare(self.loss, self.loss, 2)
        self.groups = self.units.grouping.groups

    @property
    def units(self):
        return self.pruner.units

    def loss(self, model, iteration=0):
        shift = 0.1 * iteration  # another batch each time
        return square_loss(model(images().double() + shift))

    def share(self, cost='macs'):
        """What remains of a cost, as a share of that of the whole model."""
        return self.units.totals[cost] / self.units.full[cost]

    def train(self, iterations):
        """The results of `step`."""
        steps = []
        for _ in range(iterations):
            self.optimizer.zero_grad()
            (self.loss(self.model, self.iteration) * self.scale).backward()
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self.scale
            self.optimizer.step()
            steps.append(self.pruner.step())
            self.iteration += 1
        return steps

    def train_until(self, finished):
        """The last result of `step`."""
        for _ in range(200):
            (step,) = self.train(1)
            if finished():
                return step
        raise AssertionError('no end after 200 iterations')


# -- discovery -----------------------------------------------------------------


PENALTIES = {
    'L1': lambda m: sum(p.abs().sum() for p in m.parameters()),
    'L2': lambda m: 0.5 * sum((p * p).sum() for p in m.parameters()) / 10,
    'norms': lambda m: torch.stack([p.norm() for p in m.parameters()]).max(),
    'rows': lambda m: m.conv1.weight.pow(2).sum((1, 2, 3)).sqrt().sum(),
    'slimming': lambda m: 0.1 * m.bn.weight.abs().sum(),
    'one vector': lambda m: nn.utils.parameters_to_vector(m.parameters()).norm(),
}


@pytest.mark.parametrize('penalty', PENALTIES.values(), ids=PENALTIES.keys())
def test_a_penalty_on_weights_freezes_nothing(penalty):
    """Masked and compact model have equal outputs, whatever the loss adds."""

    class Penalised(Run):
        def loss(self, model, iteration=0):
            outputs = super().loss(model, iteration)
            return outputs + 0.01 * penalty(model) * torch.is_grad_enabled()

    run, plain = Penalised(ConvPair, interval=1, lr=1e-3), Run(ConvPair)
    names, expected = (
        [(g.name, g.units) for g in r.pruner.units.grouping.groups]
        for r in (run, plain)
    )
    assert names == expected
    run.train(2)
    small = run.pruner.compact()
    assert small.conv1.out_channels == 4
    x = images().double()
    assert torch.allclose(run.model.eval()(x), small.eval()(x), atol=1e-12)
    penalty(small).backward()


@pytest.mark.parametrize(
    'penalty',
    [
        lambda m: (m.conv1.weight - torch.ones(6, 3, 3, 3)).abs().sum(),
        lambda m: nn.functional.mse_loss(m.bn.weight, torch.ones(6).double()),
        lambda m: (m.bn.bias * torch.ones(6)).sum(),
        lambda m: (m.bn.weight * m.conv2.weight[0, :, 0, 0]).sum(),
    ],
)
def test_a_penalty_that_knows_the_width_freezes_it(penalty):
    model = ConvPair().double()

    def loss(model):
        return square_loss(model(images().double())) + penalty(model)

    with pytest.raises(TraceError, match='an output: reaches the loss without'):
        GroupFisherPruner(model).prepare(loss, lambda m: m(images().double()), 2)


# -- decisions ----------------------------------------------------------------


def test_prunes_one_unit_after_each_interval():
    steps = Run(interval=3).train(7)
    sizes = [None if s is None else len(s.units) for s in steps]
    assert sizes == [None, None, 1, None, None, 1, None]


def test_accumulators_start_anew_after_each_decision():
    run = Run(interval=2)
    run.train(1)
    assert importance_of(run.pruner).any()
    run.train(1)
    assert not importance_of(run.pruner).any() and not seen_by(run.pruner).any()


@pytest.mark.parametrize('normalize', ['memory', 'flops', 'none'])
def test_decision_is_that_of_the_paper(normalize):
    """Accumulated Fisher information over what the removal saves, the least goes."""
    run = Run(interval=3, normalize=normalize)
    groups, tap, total = run.groups, run.pruner.criterion.tap, 0
    for _ in range(3):
        tap.detach()
        fisher = mask_fisher(run.model, lambda m: run.loss(m, run.iteration), groups, 2)
        tap.attach()
        total += fisher.numpy()
        (step,) = run.train(1)
    costs = RunningCosts(run.units.costs, np.zeros(len(groups)))
    cost = np.ones(len(groups)) if normalize == 'none' else costs.savings(normalize)
    assert step.units.tolist() == [(total / cost[run.units.group_of]).argmin()]


@pytest.mark.parametrize('normalize', ['memory', 'flops', 'none'])
def test_scale_of_the_loss_changes_no_decision(normalize):
    """As under mixed precision, where it is scaled by 65536."""
    for pace in (3, 'auto'):
        options = dict(interval=2, units_per_step=pace, normalize=normalize)
        plain, scaled = (Run(scale=s, **options).train(8) for s in (1.0, 65536.0))
        assert picked(scaled) == picked(plain)
        assert len(picked(plain)[1]) == 3 or pace == 'auto'


def test_overflowed_iterations_do_not_count():
    run = Run(interval=2)
    for scale in (float('inf'), 1.0):
        step = iterate(run.pruner, lambda model, by=scale: run.loss(model) * by)
    assert len(step.units) == 1
    assert np.isfinite(importance_of(run.pruner)).all()


def test_a_run_without_a_good_iteration_stops(caplog):
    run = Run(interval=2, max_nonfinite=3)
    caplog.set_level(logging.WARNING)
    words = (
        r'gradients must be finite ones \(got NaN or infinity in the last 3 iterations'
        r'\); look at the loss, .*max_nonfinite'
    )
    with pytest.raises(StatisticsError, match=words):
        for value in (1, float('nan'), float('nan'), float('inf'), float('nan')):
            iterate(run.pruner, lambda model, by=value: run.loss(model) * by)
    assert 'gradients were not finite in 1 iterations so far' in caplog.text


def test_a_good_iteration_ends_the_row():
    run = Run(interval=1, max_nonfinite=2)
    for value in (float('nan'), 1, float('nan'), 1):
        iterate(run.pruner, lambda model, by=value: run.loss(model) * by)
    assert run.units.kept.sum() == len(run.units.kept) - 2


def test_pruned_units_stay_pruned():
    run = Run(interval=1, units_per_step=4)
    gone = np.concatenate([s.units for s in run.train(5)])
    assert len(set(gone.tolist())) == len(gone) == (~run.units.kept).sum()


# -- how many at once ---------------------------------------------------------


@pytest.mark.parametrize('iterations', [12, 13])
def test_iterations_reach_the_target_along_a_straight_line(iterations):
    run = Run(interval=2, iterations=iterations, target=dict(flops=0.4))
    for decision in range(1, 7):
        before = run.share()
        step = run.train(2)[-1]
        point = before + (0.4 - before) / (7 - decision)
        line = 1 - 0.6 * decision / 6
        if not len(step.units):  # a unit took more than its share before
            assert run.share() == before <= line + 1e-9
            continue
        assert step.totals['macs'] / run.units.full['macs'] == run.share()
        assert run.share() <= point + 1e-12 <= line + 1e-9
        run.units.kept[step.units[-1]] = True
        assert run.share() > point  # and not further than that
        run.units.kept[step.units[-1]] = False
    assert run.pruner.done and run.iteration == 12


def test_iterations_with_stations_end_in_time():
    targets = [dict(flops=0.55), dict(memory=0.6), dict(flops=0.5)]
    run = Run(interval=2, iterations=10, target=targets)
    steps = [s for s in run.train(10) if s is not None]
    assert run.pruner.done
    assert tuple(r for s in steps for r in s.reached) == run.pruner.reached
    # a station is not passed by
    (at_first,) = [s for s in steps if Target('flops', 0.55) in s.reached]
    assert Target('flops', 0.5) not in at_first.reached


def test_late_iterations_go_on_to_the_target():
    run = Run(interval=1, iterations=2)
    run.pruner.iteration = 5
    run.train(1)
    assert run.pruner.done


def test_auto_takes_what_is_least_important_together():
    run = Run(interval=1, units_per_step='auto', normalize='none')
    importance = np.full(run.units.grouping.units, 1000.0)
    importance[[1, 4, 7, 9]] = 1, 2, 5, 400
    bound = 0.01 * (1000 * (len(importance) - 4) + 408)
    assert 3 * (1 + 2 + 5) <= bound < 4 * (1 + 2 + 5 + 400)
    state = run.pruner.criterion.state_dict()
    state['importance'], state['seen'] = torch.from_numpy(importance), state['seen'] + 1
    run.pruner.criterion.load_state_dict(state)
    assert run.pruner.step().units.tolist() == [1, 4, 7]


@pytest.mark.parametrize(
    'pace', [dict(units_per_step=1), dict(iterations=5), dict(units_per_step='auto')]
)
@pytest.mark.parametrize(('toy', 'divisor'), [(TinyDetector, 2), (GroupConv, 4)])
def test_groups_end_at_multiples_of_the_divisor(toy, divisor, pace):
    run = Run(toy, interval=1, divisor=divisor, target=dict(flops=0.6), **pace)
    assert {g.members[0].width for g in run.groups} == {2 if toy is GroupConv else 1}
    for _ in range(30):
        run.train(1)
        for group, removed in zip(run.groups, run.units.removed, strict=True):
            if removed:
                width = (group.units - removed) * group.members[0].width
                assert width % divisor == 0
        if run.pruner.done:
            break
    assert run.pruner.done and run.units.removed.any()


# -- limits, targets, keep ----------------------------------------------------


def test_stops_at_the_target():
    run = Run(interval=1, target=dict(flops=0.6), units_per_step=2)
    step = run.train_until(lambda: run.pruner.done)
    assert run.share() <= 0.6
    assert step.reached == (Target('flops', 0.6),)
    # one unit earlier the target was not met
    run.units.kept[step.units[-1]] = True
    assert run.share() > 0.6
    run.units.kept[step.units[-1]] = False
    assert run.train(2) == [None, None]


def test_several_targets_are_stations():
    targets = [dict(flops=0.8), dict(memory=0.7), dict(flops=0.5)]
    run = Run(interval=1, target=targets, units_per_step=100)
    steps = run.train(4)
    assert steps[3] is None
    assert tuple(r for s in steps[:3] for r in s.reached) == run.pruner.reached
    for step in steps[:3]:
        for target in step.reached:
            ratio = step.totals[target.cost] / run.units.full[target.cost]
            assert target.ratio - 0.15 < ratio <= target.ratio
    assert run.pruner.done


@pytest.mark.parametrize(
    ('options', 'least'),
    [
        (dict(min_channels=1), [1]),
        (dict(min_channels=3), [2]),  # two units of two channels
        (dict(min_channels=4), [2]),
        (dict(max_ratio=0.5), [2]),
        (dict(max_ratio=0.25, min_channels=2), [3]),
        (dict(min_channels=99), [4]),
    ],
)
def test_limits_count_channels(options, least):
    """A target beyond them is refused with the ratio at which all are reached."""
    options = dict(interval=1, **options)
    with pytest.raises(ConfigError, match=r'target\.flops .*\(got 0\.01\)') as refused:
        Run(GroupConv, target=dict(flops=0.01), **options)
    ratio = float(re.search(r'at least ([\d.]+),', str(refused.value))[1])
    if least == [4]:  # nothing may go
        assert ratio == 1
        return
    with pytest.raises(ConfigError, match=f'at least {ratio:g},'):
        Run(GroupConv, target=[dict(flops=0.99), dict(flops=ratio - 2e-3)], **options)
    run = Run(GroupConv, target=dict(flops=ratio), **options)
    run.train(6)
    left = run.units.grouping.units - run.units.removed
    assert left.tolist() == least
    assert run.pruner.done


@pytest.mark.parametrize(
    ('keep', 'gone'),
    [
        (['stem'], {'stem'}),
        (['fpn1'], {'lateral1', 'fpn1'}),  # what it reads and what it makes
        (['*_tower'], {'fpn1', 'cls_tower', 'reg_tower'}),
        (['stem', 'stage[12]'], {'stem', 'stage1', 'stage2'}),
    ],
)
def test_keep_leaves_layers_alone(keep, gone):
    every = {g.name for g in Run().groups}
    kept = Run(keep=keep, target=dict(flops=0.9)).units.grouping
    assert {g.name for g in kept.groups} == every - gone
    assert 'kept as configured' in {f.reason for f in kept.frozen}


def test_keep_takes_whole_modules():
    run = Run(TwoBranches, keep=['left'], target=dict(flops=0.9))
    assert [g.name for g in run.groups] == ['right.conv1']


@pytest.mark.parametrize(
    ('toy', 'left'),
    [
        (ConvPair, ['conv1']),
        (ResidualPair, ['conv1']),  # the stem's channels are those of conv2, too
        (SharedHead, ['tower']),  # two layers read the stem; a shared head is one
    ],
)
def test_uncoupled_leaves_pairs_of_layers(toy, left):
    pairs = Run(toy, coupled=False, target=dict(flops=0.9)).units.grouping
    assert [g.name for g in pairs.groups] == left
    reasons = reasons_of(pairs)
    shared = 'its channels are shared by several layers, and coupled=False'
    for group in Run(toy).groups:
        for layer in group.layers('out'):
            assert reasons.get(layer) == (None if group.name in left else shared)


def test_channels_through_a_group_conv_are_never_uncoupled():
    with pytest.raises(TraceError, match='shared by several layers, and coupled=False'):
        Run(GroupConv, coupled=False)


def test_keep_must_name_a_layer():
    words = r"keep must be names or patterns of .* layers.* \(got 'nothing'\); see"
    with pytest.raises(ConfigError, match=words):
        Run(keep=['conv1', 'nothing'], toy=ConvPair)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = conv(3, 4)
        self.unused = conv(3, 4)

    def forward(self, x):
        return self.only(x)


def test_nothing_to_prune_is_an_error_with_reasons():
    words = (
        r'model must have at least one group of channels that can be pruned \(got none'
        r'\); every layer is left alone because: an output: .*; took no part in the l'
    )
    with pytest.raises(TraceError, match=words):
        Run(OneLayer)


# -- groups without a gradient ------------------------------------------------


class TwoBranches(nn.Module):
    """Twice the same; the loss may leave out either."""

    def __init__(self):
        super().__init__()
        self.left, self.right = ConvPair(), ConvPair()

    def forward(self, x):
        return self.left(x), self.right(x)


def test_group_without_gradient_is_left_alone_and_named_once(caplog):
    run = Run(TwoBranches, interval=1)
    with caplog.at_level(logging.WARNING, 'mmgfp'):
        for _ in range(3):
            iterate(run.pruner, lambda model: square_loss(model(images().double())[0]))
    assert run.units.removed.tolist() == [3, 0]
    words = 'group right.conv1 got no gradient in 1 iterations and is left alone until '
    assert [r.getMessage() for r in caplog.records] == [f'{words}it does']
    run.train_until(lambda: run.units.removed[1] > 0)


def test_frozen_stage_is_left_alone():
    """Inputs that need no gradient have no statistics."""

    def frozen_stem():
        model = SharedHead()
        model.stem.requires_grad_(False)
        return model

    run = Run(frozen_stem, interval=1, units_per_step=9)
    assert run.groups[0].name == 'stem'
    run.train(2)
    assert run.units.removed[0] == 0
    assert run.units.removed[1:].sum() > 0
    assert not any(p.requires_grad for p in run.model.stem.parameters())


def test_step_without_backward_is_harmless():
    run = Run(interval=1)
    assert len(run.pruner.step().units) == 0
    with torch.no_grad():
        run.loss(run.model.eval())
    assert len(run.pruner.step().units) == 0
    assert run.units.kept.all()


# -- the compact model --------------------------------------------------------


@pytest.mark.parametrize('toy', TOYS)
def test_masked_and_compact_model_train_alike(toy):
    run = Run(toy, interval=1, units_per_step=3, target=dict(flops=0.55))
    run.train_until(lambda: run.pruner.done or run.iteration == 8)
    assert run.units.removed.any()
    losses = []
    small = run.pruner.compact()
    assert type(small) is type(run.model)
    for model in (run.model, small):
        optimizer = sgd(model)
        losses.append([])
        for iteration in range(5):
            optimizer.zero_grad()
            loss = run.loss(model.train(), iteration)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            run.units.masks[0].apply()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(set(losses[0])) == 5


def test_compact_is_a_copy_without_hooks():
    run = Run(interval=1)
    run.train(3)
    before = copy.deepcopy(run.model.state_dict())
    small = run.pruner.compact()
    assert not any(m._forward_pre_hooks for m in small.modules())
    assert not any(p._backward_hooks for p in small.parameters())
    assert parameters_in(small) == run.units.totals['params']
    after = run.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert len(run.train(1)[0].units) == 1  # the pruner goes on


def test_what_nothing_refers_to_any_more_is_freed():
    run = Run(interval=1)
    run.train(3)
    left = [weakref.ref(p) for p in (*run.model.parameters(), run.pruner)]
    del run
    gc.collect()
    assert not any(ref() is not None for ref in left)


def test_verification_keeps_no_copies():
    run = Run(interval=1)
    run.train(3)
    before = parameters_alive()
    assert disagreement(run.model, run.groups, run.units.kept, run.loss) is None
    assert parameters_alive() == before


def parameters_alive():
    gc.collect()
    return sum(type(x) is nn.Parameter for x in gc.get_objects())


def test_structure_names_what_is_kept():
    run = Run(ConvPair)
    run.units.kept[[1, 4]] = False
    kept = run.units.structure().kept
    assert kept['conv1.weight'] == {0: [0, 2, 3, 5]}
    assert kept['conv2.weight'] == {1: [0, 2, 3, 5]}
    assert kept['bn.running_var'] == {0: [0, 2, 3, 5]}
    assert 'conv2.bias' not in kept


# -- state --------------------------------------------------------------------


def test_state_dict_round_trip():
    options = dict(interval=2, target=[dict(flops=0.9), dict(flops=0.2)])
    run = Run(units_per_step=9, **options)
    run.train(3)
    state = saved_and_loaded(run.pruner.state_dict())
    other = Run(units_per_step=9, **options)
    other.pruner.load_state_dict(state)
    assert other.pruner.iteration == 3
    assert other.pruner.reached == run.pruner.reached != ()
    assert (other.units.kept == run.units.kept).all()
    assert (importance_of(other.pruner) == importance_of(run.pruner)).all()
    assert (seen_by(other.pruner) == seen_by(run.pruner)).all()
    assert other.units.totals == run.units.totals
    # Tensors of groups and all: nothing is lost on the way.
    assert saved(other.pruner.state_dict()) == saved(run.pruner.state_dict())


def test_state_of_another_input_size_is_refused():
    """Costs are of the interrupted run's, so what it would be counted for differs."""
    run = Run(ConvPair, input_shape=(3, 8, 8))
    state = saved_and_loaded(run.pruner.state_dict())
    GroupFisherPruner(ConvPair(), input_shape=[3, 8, 8]).load_state_dict(state)
    for shape in ((3, 16, 16), None):
        pruner = GroupFisherPruner(ConvPair(), input_shape=shape)
        with pytest.raises(ConfigError, match=r'input_shape must be \(3, 8, 8\) \(got'):
            pruner.load_state_dict(state)


def test_resuming_with_a_harder_target_needs_one_that_can_be_reached():
    run = Run(ConvPair, interval=1)
    run.train(2)
    state = saved_and_loaded(run.pruner.state_dict())

    def resume(ratio):
        options = dict(interval=1, max_ratio=0.5, target=dict(flops=ratio))
        GroupFisherPruner(ConvPair(), **options).load_state_dict(state)

    resume(0.5)
    with pytest.raises(ConfigError, match=r'at least 0\.5, which .*\(got 0\.4\)'):
        resume(0.4)


@pytest.mark.parametrize('first', ['the same', 'another'])
def test_a_model_is_prepared_once_at_a_time(first):
    run = Run(ConvPair, interval=1)
    run.train(1)
    pruner = run.pruner if first == 'the same' else GroupFisherPruner(run.model)
    words = r'model must be pruned by one pruner or hook at a time.*; close the other'
    with pytest.raises(ConfigError, match=words):
        pruner.prepare(run.loss, run.loss, 2)
    GroupFisherPruner(copy.deepcopy(run.pruner.compact())).prepare(
        run.loss, run.loss, 2
    )
    run.pruner.close()
    pruner.prepare(run.loss, run.loss, 2)


def test_a_refused_run_leaves_the_model_to_another():
    model = ConvPair()

    def loss(model):
        return square_loss(model(images()))

    with pytest.raises(ConfigError, match='at least'):
        GroupFisherPruner(model, target=dict(flops=1e-3)).prepare(loss, loss, 2)
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
    GroupFisherPruner(model).prepare(loss, loss, 2)


def test_state_is_a_snapshot():
    run = Run(interval=1)
    state = run.pruner.state_dict()
    run.train(2)
    assert state['kept'].all()
    assert not any(sums.any() for sums in state['criterion'].values())


TWO_TARGETS = [dict(flops=0.8), dict(flops=0.5)]


def test_one_shot_reaches_each_target_after_as_many_iterations():
    one_shot = dict(type='one_shot', iterations=4)
    run = Run(interval=2, schedule=one_shot, target=TWO_TARGETS)
    before = run.train(3)
    assert before == [None] * 3 and (seen_by(run.pruner) == 3).all()
    steps = run.train(6)
    reached = [None if s is None else [t.ratio for t in s.reached] for s in steps]
    assert reached == [[0.8], None, None, None, [0.5], None] and run.pruner.done


@pytest.mark.parametrize(
    'pace',
    [
        dict(units_per_step=2),
        dict(units_per_step='auto', divisor=2),
        dict(iterations=12, target=dict(flops=0.3)),
        dict(schedule=dict(type='cubic', iterations=12)),
        dict(schedule=dict(type='one_shot', iterations=5), target=TWO_TARGETS),
    ],
)
@pytest.mark.parametrize('cut', [4, 5, 6])
def test_resumed_run_decides_as_if_it_had_not_stopped(cut, pace):
    """Cut before, on and after a decision; nothing but saved state is carried over."""
    options = dict(interval=3, **pace)
    whole = Run(**options)
    expected = picked(whole.train(12))
    first = Run(**options)
    begun = picked(first.train(cut))
    state = state_of(first)
    resumed = Run(lambda: _loaded(TinyDetector(), state['model']), **options)
    resumed.optimizer.load_state_dict(state['optimizer'])
    resumed.pruner.load_state_dict(state['pruner'])
    resumed.iteration = cut
    assert begun + picked(resumed.train(12 - cut)) == expected
    weights = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def _loaded(model, state):
    model.double().load_state_dict(state)
    return model


def test_resumed_masks_are_applied():
    run = Run(interval=1)
    run.train(3)
    other = Run(interval=1)
    other.pruner.load_state_dict(run.pruner.state_dict())
    small = other.pruner.compact()
    outputs = [m.eval()(images().double()) for m in (other.model, small)]
    for masked, cut in zip(*outputs, strict=True):
        torch.testing.assert_close(masked, cut)


def test_resuming_needs_no_batch_and_keeps_the_costs():
    run = Run(interval=2)
    run.train(3)
    state = saved_and_loaded(run.pruner.state_dict())
    pruner = GroupFisherPruner(TinyDetector().double(), interval=2)
    pruner.load_state_dict(state)
    assert pruner.units.full == run.units.full
    assert pruner.units.totals == run.units.totals
    assert pruner.units.structure() == run.units.structure()
    assert pruner.units.grouping.frozen == run.units.grouping.frozen


def test_target_met_before_resuming_costs_no_unit():
    run = Run(interval=1, target=dict(flops=0.5), units_per_step=9)
    run.train_until(lambda: run.share() < 0.7)
    easier = Run(interval=1, target=dict(flops=0.75))
    easier.pruner.load_state_dict(run.pruner.state_dict())
    (step,) = easier.train(1)
    assert step.reached == (Target('flops', 0.75),)
    assert len(step.units) == 0


# -- what it leaves behind ----------------------------------------------------


def test_preparing_leaves_the_model_as_it_was():
    model = TinyDetector()
    model.stage2.eval()
    model.stem.requires_grad_(False)
    torch.manual_seed(3)
    before, modes = copy.deepcopy(model.state_dict()), _flags(model)
    random_state = torch.get_rng_state()
    x = images()

    def loss(model):
        return square_loss(model(x + torch.rand(1)))

    GroupFisherPruner(model).prepare(loss, loss, 2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert _flags(model) == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def _flags(model):
    modes = [m.training for m in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()]


def test_closed_pruner_leaves_no_hooks_and_zeroed_columns():
    run = Run(ConvPair, interval=1)
    run.train(2)
    run.pruner.close()
    assert not any(m._forward_pre_hooks for m in run.model.modules())
    assert not any(p._backward_hooks for p in run.model.parameters())
    gone = ~run.units.kept
    assert gone.sum() == 2
    assert not run.model.conv2.weight[:, torch.from_numpy(gone)].any()


def test_checkpoints_hold_no_key_of_the_pruner():
    run = Run(ConvPair, interval=1)
    run.train(1)
    assert set(run.model.state_dict()) == set(ConvPair().state_dict())


def test_mixed_precision_gathers_nearly_the_same():
    torch.manual_seed(0)
    pruner = prepared(ConvPair())
    iterate(pruner)
    exact = importance_of(pruner)
    with torch.autocast('cpu', torch.bfloat16):
        value = toy_loss(pruner.model).float()
    value.backward()
    pruner.step()
    assert importance_of(pruner) - exact == pytest.approx(exact, rel=0.1)
