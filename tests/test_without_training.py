"""Pruning without training: what goes, in how many cuts, and what is left."""

import copy

import numpy as np
import pytest
import torch
from support.pruning import hooks_on
from support.runs import assert_equal
from support.toys import (
    TOYS,
    ConvPair,
    GroupConv,
    TinyDetector,
    images,
    square_loss,
    toy_forward,
)
from torch import nn

from mmgfp import ChannelPruner
from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.options import CompensationConfig
from mmgfp.output_losses import output_losses
from mmgfp.rounds import Journal, stations
from mmgfp.surgery.compact import compact
from mmgfp.utils.errors import ConfigError
from mmgfp.without_training import prune_without_training

LEAST_SQUARES = CompensationConfig(method='least_squares')


def losses(count=4):
    batches = [images(4, seed=seed) for seed in range(count)]
    return [lambda m, x=x: square_loss(m(x)) for x in batches]


def run(net, target=0.6, compensation=LEAST_SQUARES, **options):
    config = options.pop('config', {})
    config = {'target': dict(flops=target), **config}
    first = (losses(), lambda m: m(images(4)), 4)
    options = {'rounds': 1, **options}
    return prune_without_training(net, *first, config, compensation, **options)


def test_one_cut_takes_the_units_that_a_pruner_takes_and_refits():
    """By the sums of Fisher information over all batches, in eval mode."""
    torch.manual_seed(0)
    net = TinyDetector()
    result = run(net)
    model = copy.deepcopy(net).eval()
    pruner = ChannelPruner(
        model, target=dict(flops=0.6), schedule='one_shot', interval=4
    )
    grouping = pruner.prepare(losses()[0], lambda m: m(images(4)), 4)
    for loss in losses():
        loss(model).backward()
        step = pruner.step()
    assert result.rounds[0].units.tolist() == step.units.tolist()
    assert result.structure == pruner.units.structure()
    assert result.totals == step.totals
    expected = compensate(net, grouping, pruner.units.kept, losses(), LEAST_SQUARES)
    assert result.rounds[0].layers == expected.layers
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


@pytest.mark.parametrize(
    ('toy', 'compensation'),
    [(TinyDetector, None), *((toy, LEAST_SQUARES) for toy in TOYS)],
)
def test_several_cuts_make_one_structure(toy, compensation):
    """The compact model has it, and what a masked one gives is what it gives."""
    torch.manual_seed(0)
    net = toy()
    net.train()
    before = copy.deepcopy(net.state_dict())
    result = run(net, compensation=compensation, rounds=2)
    assert [r.target.ratio for r in result.rounds] == [pytest.approx(0.6**0.5), 0.6]
    assert result.totals['flops'] <= 0.6 * result.full['flops']
    units = np.concatenate([r.units for r in result.rounds])
    assert len(units) == len(set(units.tolist()))
    plain = compact(net, result.structure)
    shapes = {n: t.shape for n, t in plain.state_dict().items()}
    assert {n: t.shape for n, t in result.model.state_dict().items()} == shapes
    # Widths that modules repeat in attributes follow, too.
    assert repr(result.model) == repr(plain)
    if compensation is None:
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, result.model.state_dict()[name])
    square_loss(toy_forward(result.model)).backward()
    # The model is as it was.
    assert net.training and result.model.training
    assert hooks_on(net) == hooks_on(result.model) == 0
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_the_second_cut_is_scored_on_what_the_first_one_made():
    torch.manual_seed(0)
    net = TinyDetector()
    whole = run(net, rounds=2)
    first = run(net, target=0.6**0.5)
    assert whole.rounds[0].units.tolist() == first.rounds[0].units.tolist()
    second = run(first.model, target=0.6 * first.full['flops'] / first.totals['flops'])
    assert len(whole.rounds[1].units) == len(second.rounds[0].units)
    for name, tensor in second.model.state_dict().items():
        torch.testing.assert_close(tensor, whole.model.state_dict()[name])


def test_frozen_stages_can_go_and_stay_frozen():
    torch.manual_seed(0)
    net = ConvPair()
    net.conv1.requires_grad_(False)
    result = run(net)
    assert result.model.conv1.out_channels < net.conv1.out_channels
    assert not result.model.conv1.weight.requires_grad
    assert result.model.conv2.weight.requires_grad


def test_lines_say_what_begins():
    lines = []
    run(GroupConv(), journal=Journal(lines.append), rounds=1)
    assert lines == [
        'finding coupled channels',
        'flops to 60%: scoring units',
        'flops to 60%: 0 of 1 layers refitted',
        'flops to 60%: 1 of 1 layers refitted',
    ]
    lines.clear()
    run(GroupConv(), compensation=None, journal=Journal(lines.append), rounds=[0.8])
    assert lines[1:] == [
        'round 1 of 2, flops to 80%: scoring units',
        'round 2 of 2, flops to 60%: scoring units',
    ]


class Killed(Exception):
    """What ends a run between two rounds."""


def interrupted(net, after, file, **options):
    """Run up to the end of a round, keep its state in a file, and go on from it."""

    def keep(done, state):
        torch.save(state, file)
        rounds.append(done)
        if len(rounds) == after:
            raise Killed

    rounds = []
    with pytest.raises(Killed):
        run(net, journal=Journal(after_round=keep), **options)
    state = torch.load(file, weights_only=True)
    return run(net, journal=Journal(state=state), **options)


MANY = dict(rounds=3, target=0.5)


@pytest.mark.parametrize(
    ('toy', 'after', 'options'),
    [
        *((TinyDetector, n, dict(MANY)) for n in (1, 2, 3)),
        (TinyDetector, 2, dict(MANY, compensation=CompensationConfig())),
        (TinyDetector, 1, dict(compensation=None, config=dict(criterion='random'))),
        *((toy, 1, {}) for toy in TOYS),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    toy, after, options, tmp_path
):
    torch.manual_seed(0)
    net = toy()
    options = dict(rounds=2) | options
    whole = run(net, **options)
    other = interrupted(net, after, tmp_path / 'state.pth', **options)
    assert other.structure == whole.structure and other.full == whole.full
    assert repr(other.model) == repr(whole.model)
    assert len(other.rounds) == len(whole.rounds) >= after
    for one, two in zip(other.rounds, whole.rounds, strict=True):
        assert_equal(one.to_dict(), two.to_dict())
    assert_equal(other.model.state_dict(), whole.model.state_dict())
    flags = [
        {n: p.requires_grad for n, p in m.named_parameters()}
        for m in (other.model, whole.model)
    ]
    assert flags[0] == flags[1]
    assert hooks_on(other.model) == 0


def test_states_of_other_runs_are_refused():
    torch.manual_seed(0)
    net, states = TinyDetector(), []
    run(
        net,
        rounds=2,
        journal=Journal(after_round=lambda done, state: states.append(state)),
    )
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match=r'rounds of the state .*0\.7.*begin anew'):
        run(net, rounds=[0.7], journal=Journal(state=states[0]))
    with pytest.raises(ConfigError, match='state must be one that after_round'):
        run(net, rounds=2, journal=Journal(state={**states[0], 'small': {}}))
    with pytest.raises(ConfigError, match='checkpoint must be'):
        run(ConvPair(), rounds=2, journal=Journal(state=states[0]))
    assert_equal(net.state_dict(), before)


def test_without_labels_gradients_are_those_of_the_distance_to_the_own_outputs():
    """On average over signs: sum (d y_i / d b)^2 / |y|^2, which is N / |y|^2."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 2), torch.rand(2, 3)
    forwards = [lambda m: (m(x), torch.ones(2, dtype=torch.int64))] * 4000
    squares = torch.zeros(2)
    for loss in output_losses(net, forwards):
        (grad,) = torch.autograd.grad(loss(net), net.bias)
        squares += grad.square() / len(forwards)
    expected = 2 / net(x).detach().square().sum()
    torch.testing.assert_close(squares, expected.expand(2), rtol=0.1, atol=0)


def test_outputs_of_zero_have_finite_gradients():
    net, x = nn.Linear(3, 2), torch.ones(1, 3)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    (loss,) = output_losses(net, [lambda m: m(x)])
    (grad,) = torch.autograd.grad(loss(net), net.bias)
    assert grad.abs().tolist() == [1, 1]


def test_pruning_without_labels():
    torch.manual_seed(0)
    net = TinyDetector()
    forwards = [lambda m, seed=s: m(images(4, seed=seed)) for s in range(4)]
    config = dict(target=dict(flops=0.6))
    losses = output_losses(net, forwards)
    compensation = CompensationConfig()
    result = prune_without_training(net, losses, forwards[0], 4, config, compensation)
    assert result.totals['flops'] <= 0.6 * result.full['flops']
    assert any(layer.reason is None for layer in result.rounds[0].layers)


class WithAuxiliary(nn.Module):
    """A branch that only training runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 4, 3)
        self.inner = nn.Conv2d(8, 6, 1)
        self.outer = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(self.stem(x).relu())

    def loss(self, x):
        features = self.stem(x).relu()
        outputs = self.head(features), self.outer(self.inner(features).relu())
        return sum(y.square().sum() for y in outputs)


def test_branches_of_training_follow_though_outputs_do_not_show_them(caplog):
    torch.manual_seed(0)
    net = WithAuxiliary()
    forwards = [lambda m, seed=s: m(images(4, seed=seed)) for s in range(4)]
    result = prune_without_training(
        net,
        output_losses(net, forwards),
        forwards[0],
        4,
        dict(target=dict(flops=0.5)),
        CompensationConfig(),
        tracing_loss=lambda m: m.loss(images(4)),
    )
    small = result.model
    assert small.stem.out_channels == small.head.in_channels == 4
    # What reads the stem is cut; the branch's own channels have no scores.
    assert small.inner.in_channels == 4 and small.inner.out_channels == 6
    assert 'got no gradient' in caplog.text
    assert small.loss(images(4)).isfinite()


@pytest.mark.parametrize(
    'forward',
    [
        lambda m: (m(images(4)), images(4)),
        lambda m: torch.ones(4, dtype=torch.int64),
    ],
)
def test_outputs_without_gradients_are_refused(forward):
    with pytest.raises(ConfigError, match='outputs must be tensors that gradients'):
        output_losses(TinyDetector(), [forward])


def test_outputs_that_are_not_finite_are_refused():
    """Their share of the loss would be none or NaN."""

    def forward(model):
        return model(images(4)), next(model.parameters()) * float('inf')

    with pytest.raises(ConfigError, match='outputs must be finite .*in 1 of'):
        output_losses(TinyDetector(), [forward])


def test_where_cuts_end():
    assert stations(0.75) == [0.75] and len(stations(0.74)) == 2
    assert len(stations(0.5)) == 3 and len(stations(0.2)) == 6
    assert [len(stations(0.75**k)) for k in range(1, 9)] == [*range(1, 9)]
    assert stations(0.25, 2) == [0.5, 0.25]
    wrong = ((0, 'at least 1'), (2.5, 'at least 1'), ([0.2], 'fall'), ([1.0], 'fall'))
    for rounds, words in wrong:
        with pytest.raises(ConfigError, match=words):
            stations(0.3, rounds)


def test_bad_arguments():
    net = ConvPair()
    with pytest.raises(ConfigError, match='target must be one target .*got 2'):
        run(net, config=dict(target=[dict(flops=0.6), dict(flops=0.5)]))
    with pytest.raises(ConfigError, match='two batches or more'):
        prune_without_training(
            net, losses(1), lambda m: m(images(4)), 4, None, LEAST_SQUARES
        )
    with pytest.raises(ConfigError, match='no losses'):
        prune_without_training(net, [], toy_forward, 2)
