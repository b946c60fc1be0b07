"""Live compaction: cutting a model that trains changes nothing but its speed."""

import copy

import numpy as np
import pytest
import torch
from support.pruning import importance_of
from support.states import picked, saved_and_loaded, state_of
from support.toys import (
    TOYS,
    ConvPair,
    TinyDetector,
    conv,
    images,
    parameters_in,
    square_loss,
)
from torch import nn

from mmgfp import GroupFisherPruner
from mmgfp.discovery.comparing import difference
from mmgfp.surgery.compact import Replacement
from mmgfp.surgery.live import (
    check_optimizer,
    compact_optimizer_,
    units_to_keep_in_model,
)
from mmgfp.utils.errors import ConfigError

OPTIMIZERS = {
    'sgd': lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    'nesterov': lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    'plain sgd': lambda p: torch.optim.SGD(p, 0.05),
    'adam': lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    'adamw': lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    'fused adamw': lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    'rmsprop': lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    'adagrad': lambda p: torch.optim.Adagrad(p, 0.05),
}


class Training:
    """A model in double precision, pruned with masks or cut while it trains.

    Args:
        toy: Builds the model.
        optimizer: Builds the optimizer of parameters.
        live: Whether to cut after every decision.
        accumulate: Iterations whose gradients an optimizer step takes together.
        options: Arguments of the pruner.
    """

    def __init__(
        self, toy=TinyDetector, optimizer='sgd', live=True, accumulate=1, **options
    ):
        torch.manual_seed(0)
        self.model = toy().double()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.live, self.accumulate = live, accumulate
        self.pruner = GroupFisherPruner(self.model, **{'interval': 2, **options})
        self.iteration = 0

    @property
    def units(self):
        return self.pruner.units

    def prepare(self):
        self.pruner.prepare(self.loss, self.loss, 2)
        return self

    def cut(self):
        """Cut the model to the units that are kept; whether any was cut out."""
        return self.pruner.compact_([self.optimizer])

    def loss(self, model, iteration=0):
        return square_loss(model(images().double() + 0.1 * iteration))

    def train(self, iterations):
        """The results of `step`."""
        steps = []
        for _ in range(iterations):
            self.loss(self.model, self.iteration).backward()
            self.iteration += 1
            if self.iteration % self.accumulate == 0:
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                assert norm.isfinite()
                self.optimizer.step()
                self.optimizer.zero_grad()
            steps.append(self.pruner.step())
            if self.live and steps[-1]:
                self.cut()
        return steps


def assert_same_result(one, two, tolerance=1e-9):
    """Compare structures exactly, weights but for rounding."""
    assert one.units.structure() == two.units.structure()
    first, second = (t.pruner.compact().state_dict() for t in (one, two))
    close = dict(rtol=tolerance, atol=tolerance)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=name, **close)


def both(length, **options):
    """The same training with masks and cut as it goes."""
    runs = [Training(live=live, **options).prepare() for live in (False, True)]
    steps = [picked(run.train(length)) for run in runs]
    assert steps[0] == steps[1]
    return runs


# -- the same result ------------------------------------------------------------


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_ends_like_masks_with_any_optimizer(optimizer):
    masked, live = both(14, optimizer=optimizer, units_per_step=3)
    assert_same_result(masked, live)
    full, small = (parameters_in(run.model) for run in (masked, live))
    assert small == live.units.totals['params'] < full == live.units.full['params']
    assert live.units.totals == masked.units.totals


@pytest.mark.parametrize('toy', TOYS, ids=lambda toy: toy.__name__)
def test_every_toy_ends_like_masks(toy):
    masked, live = both(10, toy=toy, units_per_step=2, normalize='flops')
    assert_same_result(masked, live)
    assert not live.units.kept.all()


@pytest.mark.parametrize(
    'pace',
    [
        dict(units_per_step='auto'),
        dict(iterations=10, target=dict(flops=0.4)),
        dict(units_per_step=4, divisor=2),
        dict(units_per_step=3, statistics_interval=2, min_channels=3, max_ratio=0.5),
    ],
    ids=str,
)
def test_any_schedule_ends_like_masks(pace):
    assert_same_result(*both(12, **pace))


def test_accumulated_gradients_are_cut_along():
    """A decision falls between the two iterations of an optimizer step."""
    masked, live = both(15, accumulate=2, interval=3, units_per_step=4)
    assert_same_result(masked, live)


def test_nothing_masked_is_left_to_compute():
    live = Training(units_per_step=6).prepare()
    live.train(2)
    small = live.pruner.compact()
    shapes = {n: p.shape for n, p in small.named_parameters()}
    assert {n: p.shape for n, p in live.model.named_parameters()} == shapes
    assert not live.units.masks[0]._index
    convs = [m for m in live.model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [len(m.weight) for m in convs]


def test_cutting_less_often_ends_the_same():
    every, seldom = (Training(units_per_step=2, live=False).prepare() for _ in range(2))
    for n in range(12):
        every.train(1), seldom.train(1)
        every.cut()
        if n in (4, 9):
            assert seldom.cut() and not seldom.cut()
            assert (seldom.units.in_model == seldom.units.kept).all()
    assert not (seldom.units.in_model == seldom.units.kept).all()
    assert_same_result(every, seldom)


def test_large_groups_keep_even_numbers_of_channels():
    """Worked out by hand: a multiple of at most an eighth of what is left."""
    left = {  # alive of present units of a group, and the channels of each: stay
        (100, 128, 1): 104,  # a multiple of 8
        (97, 100, 1): 100,  # no more than there are
        (104, 128, 1): 104,
        (33, 64, 1): 36,  # of 4
        (17, 20, 1): 18,  # of 2
        (15, 20, 1): 15,
        (1, 4, 1): 1,
        (30, 40, 4): 30,  # 120 channels are one of 8 already
        (31, 40, 4): 32,
    }
    sizes = np.array([in_model for _, in_model, _ in left])
    group_of = np.repeat(np.arange(len(left)), sizes)
    rank = np.concatenate([np.arange(size) for size in sizes])
    # the last ones of each group are alive
    kept = rank >= (sizes - [a for a, _, _ in left])[group_of]
    widths = np.array([width for _, _, width in left])
    stay = units_to_keep_in_model(kept, np.ones_like(kept), group_of, widths)
    assert np.bincount(group_of[stay]).tolist() == list(left.values())
    assert stay[kept].all()
    again = units_to_keep_in_model(kept, stay, group_of, widths)
    assert (again == stay).all()


class Wide(ConvPair):
    """64 outputs of conv1."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = conv(3, 64, bias=False), nn.BatchNorm2d(64)
        self.conv2 = conv(64, 4)


def test_masked_units_may_stay_for_a_while():
    masked, live = both(8, toy=Wide, units_per_step=5, target=dict(flops=0.1))
    assert live.units.kept.sum() == 44
    assert live.model.conv1.out_channels == live.units.in_model.sum() == 44
    masked.train(2), live.train(2)
    assert live.units.kept.sum() == 39
    assert live.model.conv2.in_channels == live.units.in_model.sum() == 40
    zeros = live.model.conv2.weight.flatten(2).abs().sum((0, 2)) == 0
    assert zeros.sum() == 1
    assert_same_result(masked, live)
    state, again = saved_and_loaded(live.pruner.state_dict()), Training(Wide)
    again.pruner.load_state_dict(state, [again.optimizer])
    assert again.model.conv1.out_channels == 40
    assert again.units.masks[0]._index


def test_statistics_between_decisions_survive():
    """What was gathered counts on if the model is cut in the middle of an interval."""
    masked, live = (Training(interval=5, live=False).prepare() for _ in range(2))
    for run in (masked, live):
        run.train(7)
    before = importance_of(live.pruner)
    assert live.cut() and before.any()
    assert (importance_of(live.pruner) == before).all()
    assert picked(masked.train(8)) == picked(live.train(8))
    assert_same_result(masked, live)


# -- what goes along --------------------------------------------------------------


def test_copies_that_follow_are_masked_and_cut():
    live = Training(units_per_step=5, live=False).prepare()
    averaged = copy.deepcopy(live.model).requires_grad_(False)
    live.pruner.track_copy(averaged)
    live.train(2)
    inputs = images().double()
    before = averaged.eval()(inputs)
    live.cut()
    assert difference(before, averaged(inputs)) < 1e-12
    shapes = {n: t.shape for n, t in live.model.state_dict().items()}
    assert {n: t.shape for n, t in averaged.state_dict().items()} == shapes
    live.train(2)
    before = averaged(inputs)
    small = live.pruner.compact(averaged)
    assert difference(before, small(inputs)) < 1e-12
    assert parameters_in(small) == live.units.totals['params']


def test_memory_format_stays():
    live = Training(units_per_step=8, live=False)
    live.model.to(memory_format=torch.channels_last)
    live.prepare().train(2)
    weight = live.model.fpn1.weight
    live.cut()
    smaller = live.model.fpn1.weight
    for cut in (weight, smaller):
        assert cut.is_contiguous(memory_format=torch.channels_last)
    assert smaller.shape != weight.shape and not smaller.is_contiguous()


def test_state_of_an_optimizer_by_hand():
    old = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    other = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam(
        [dict(params=[other]), dict(params=[old, nn.Parameter(torch.ones(1))], lr=3.0)]
    )
    optimizer.state[old] = {
        'step': torch.tensor(7.0),
        'exp_avg': torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
        'note': 'text',
    }
    optimizer.state[other] = {'exp_avg': torch.tensor([8.0, 9])}
    kept = {0: torch.tensor([1]), 1: torch.tensor([0, 2])}
    made = Replacement(old, nn.Parameter(torch.zeros(1, 2)), kept)
    compact_optimizer_(optimizer, [made])
    (first, second) = optimizer.param_groups
    assert first['params'] == [other] and second['lr'] == 3.0
    assert second['params'][0] is made.new and len(second['params']) == 2
    assert old not in optimizer.state
    state = optimizer.state[made.new]
    assert state['exp_avg'].tolist() == [[4, 6]]
    assert state['step'].item() == 7 and state['note'] == 'text'
    assert optimizer.state[other]['exp_avg'].tolist() == [8, 9]


def test_optimizer_with_other_state_is_refused_and_nothing_changes():
    """Adafactor keeps sums over rows and columns."""
    live = Training(units_per_step=5, live=False)
    live.optimizer = torch.optim.Adafactor(live.model.parameters())
    live.prepare().train(2)
    before = copy.deepcopy(live.model.state_dict())
    words = r'optimizer must be one that keeps .*\(got row_var of Adafactor, Tensor'
    with pytest.raises(ConfigError, match=words):
        live.cut()
    after = live.model.state_dict()
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    live.train(2)  # goes on with masks


class Flat(torch.optim.SGD):
    """An optimizer that keeps a list of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.every = list(self.param_groups[0]['params'])


class Wrapper(torch.optim.Optimizer):
    """An optimizer that lets another one step, as SAM does."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.base = torch.optim.Adam(self.param_groups, lr)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step()


@pytest.mark.parametrize('optimizer', [torch.optim.LBFGS, Wrapper])
def test_optimizers_with_lists_and_others_inside_train_all_that_is_there(optimizer):
    live = Training(units_per_step=5, live=False)
    live.prepare().train(2)
    optimizer = optimizer(live.model.parameters(), lr=0.1)
    if isinstance(optimizer, Wrapper):
        optimizer.step()
    live.pruner.compact_([optimizer])
    before = {n: p.clone() for n, p in live.model.named_parameters()}

    def closure():
        optimizer.zero_grad()
        loss = live.loss(live.model)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    for name, parameter in live.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ('optimizer', 'what'),
    [(torch.optim.LBFGS, r'[a-z_]+ of LBFGS'), (Flat, 'every of Flat, for several')],
)
@pytest.mark.parametrize('frozen', [True, False])
def test_optimizers_with_state_of_many_parameters_are_refused(optimizer, what, frozen):
    live = Training(units_per_step=5, live=False)
    live.prepare()
    parameters = list(live.model.parameters())
    if frozen:  # a parameter that stays as it is comes first
        parameters.insert(0, nn.Parameter(torch.ones(1, dtype=torch.float64)))
    optimizer = optimizer(parameters, lr=1e-3)
    live.train(2)

    def closure():
        loss = live.loss(live.model)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ConfigError, match=rf'optimizer must be one .*\(got {what}'):
        live.pruner.compact_([optimizer])


def test_optimizer_of_a_share_of_the_parameters_is_refused():
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    with pytest.raises(ConfigError, match=r'optimizer .*\(got ZeroRedundancyOptimizer'):
        check_optimizer(ZeroRedundancyOptimizer([torch.ones(1)], 0.1))


def test_parameters_that_do_not_train_shrink_too():
    live = Training(ConvPair, units_per_step=3, live=False)
    live.model.conv2.requires_grad_(False)
    live.prepare().train(2)
    live.cut()
    assert live.model.conv2.weight.shape[1] == 3
    assert not live.model.conv2.weight.requires_grad
    assert live.model.conv1.weight.requires_grad


# -- resuming -----------------------------------------------------------------------


@pytest.mark.parametrize('cut', [1, 4, 5, 6])
@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_resumed_run_goes_on_as_if_it_had_not_stopped(cut, optimizer):
    """With a model of the first size; nothing but saved state is carried over."""
    options = dict(optimizer=optimizer, interval=3, units_per_step=3)
    whole = Training(**options).prepare()
    expected = picked(whole.train(12))
    first = Training(**options).prepare()
    begun = picked(first.train(cut))
    state = state_of(first)
    resumed = Training(**options)
    resumed.pruner.load_state_dict(state['pruner'], [resumed.optimizer])
    resumed.model.load_state_dict(state['model'])
    resumed.optimizer.load_state_dict(state['optimizer'])
    resumed.iteration = cut
    assert begun + picked(resumed.train(12 - cut)) == expected
    assert resumed.units.structure() == whole.units.structure()
    weights = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_state_of_a_cut_model_is_of_the_unpruned_one():
    live = Training(units_per_step=5).prepare()
    live.train(4)
    state = live.pruner.state_dict()
    again = Training()
    again.pruner.load_state_dict(saved_and_loaded(state), [again.optimizer])
    assert again.units.full == live.units.full
    assert again.units.totals == live.units.totals
    assert again.units.structure() == live.units.structure()
    assert np.array_equal(again.units.in_model, live.units.in_model)
