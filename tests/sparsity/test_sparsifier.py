"""Zeros that are held while an optimizer trains, without a runner."""

import copy
import pickle

import pytest
import torch
from support.states import saved_and_loaded
from torch import nn
from torch.nn import functional as F

from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.kinds import build_sparsifier
from mmgfp.sparsity.masks import follows_pattern, keep_n_of_m
from mmgfp.utils.errors import ConfigError, StatisticsError

KINDS = [
    dict(sparsity=0.75),
    dict(kind='movement', sparsity=0.75),
    dict(kind='nm'),
    dict(kind='nm', sr_ste=False),
]


def ids(options):
    return '-'.join(map(str, options.values()))


class Run:
    """A network of 4 + 72 + 16 weights that learns noise, and its sparsifier."""

    def __init__(self, optimizer=torch.optim.SGD, seed=0, **options):
        torch.manual_seed(seed)
        conv = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 3, padding=1)
        self.model = nn.Sequential(*conv, nn.Flatten(), nn.Linear(8, 2)).double()
        momentum = {'momentum': 0.9} if optimizer is torch.optim.SGD else {}
        self.optimizer = optimizer(
            self.model.parameters(), 0.004, weight_decay=0.1, **momentum
        )
        self.sparsifier = build_sparsifier(self.model, SparsityConfig(**options))
        self.images = torch.randn(8, 1, 2, 2).double()

    def train(self, steps=1, clip=None):
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(self.images) - 1).square().sum().backward()
            if clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()

    def zeros(self, model=None):
        weights = dict((model or self.model).named_parameters())
        return {name: weights[name] == 0 for name in self.sparsifier.weights}


def counts(masks):
    return [int(mask.sum()) for mask in masks.values()]


# -- how many -----------------------------------------------------------------


@pytest.mark.parametrize('kind', ['magnitude', 'movement'])
@pytest.mark.parametrize('share', [0.1, 0.37, 0.8, 0.99])
def test_density_is_exact_to_one_weight(kind, share):
    for scope in ('global', 'local'):
        run = Run(kind=kind, sparsity=share, scope=scope)
        run.sparsifier.attach(run.optimizer)
        sizes = [w.numel() for w in run.sparsifier.weights.values()]
        assert sizes == [4, 72, 16]
        for progress in (0.25, 0.5, 1.0):
            run.train(2)
            density = run.sparsifier.config.density_after(progress)
            run.sparsifier.decide(density)
            run.train(2)
            left = [n - z for n, z in zip(sizes, counts(run.zeros()), strict=True)]
            assert left == counts(run.sparsifier.masks)
            if scope == 'local':
                assert left == [round(density * n) for n in sizes]
            assert scope == 'local' or sum(left) == round(density * 92)
        assert run.sparsifier.config.density == pytest.approx(1 - share)
        assert run.sparsifier.report()['kept'] == sum(left)


def test_report():
    run = Run(sparsity=0.75, scope='local', keep=['3'])
    run.sparsifier.decide(0.25)
    assert run.sparsifier.report() == {
        'kind': 'magnitude',
        'weights': 76,
        'kept': 19,
        'density': 0.25,
        'layers': {
            '0': {'weights': 4, 'kept': 1, 'density': 0.25},
            '1': {'weights': 72, 'kept': 18, 'density': 0.25},
        },
        'left_out': {'3': 'kept as configured'},
    }


# -- zeros hold ---------------------------------------------------------------


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('options', KINDS, ids=ids)
def test_zeros_hold_through_momentum_and_decay(options, optimizer):
    run = Run(optimizer, **options)
    run.sparsifier.attach(run.optimizer)
    average = torch.optim.swa_utils.AveragedModel(run.model)
    run.sparsifier.track_copy(average.module)
    run.train(3)
    assert not any(counts(run.zeros()))
    run.sparsifier.decide(run.sparsifier.config.density)
    for _ in range(5):
        run.train()
        average.update_parameters(run.model)
        for model in (run.model, average.module):
            for name, zeros in run.zeros(model).items():
                assert torch.equal(zeros, ~run.sparsifier.masks[name])
                weight = run.sparsifier.weights[name]
                assert options.get('kind') != 'nm' or follows_pattern(weight, 2, 4)
    before = copy.deepcopy(run.model.state_dict())
    run.sparsifier.close()
    run.train()
    assert not any(counts(run.zeros()))
    assert run.model.state_dict().keys() == before.keys()


def test_clipping_sees_no_gradients_of_zeros():
    run = Run(sparsity=0.75)
    run.sparsifier.attach(run.optimizer)
    run.sparsifier.decide(0.25)
    run.train(clip=1e-3)
    for name, mask in run.sparsifier.masks.items():
        gradient = run.sparsifier.weights[name].grad
        assert gradient[mask].any() and not gradient[~mask].any()
    gradients = [p.grad.flatten() for p in run.model.parameters()]
    assert torch.cat(gradients).norm().item() == pytest.approx(1e-3, rel=1e-3)


# -- movement -----------------------------------------------------------------


def linear(weights, **options):
    """A linear layer of one output, its sparsifier and a plain SGD."""
    layer = nn.Linear(len(weights), 1, bias=False).double()
    layer.weight.data.copy_(torch.tensor([weights]))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    sparsifier = build_sparsifier(layer, SparsityConfig(**options))
    sparsifier.attach(optimizer)
    return layer, optimizer, sparsifier


def step(layer, optimizer, slopes):
    """A step for the loss slopes · weight, which are its gradients."""
    optimizer.zero_grad()
    (layer.weight * torch.tensor([slopes])).sum().backward()
    optimizer.step()


def test_movement_by_hand():
    """Two of four: those that went away from zero; what went comes back as it was."""
    layer, optimizer, sparsifier = linear(
        [1.0, -2.0, 3.0, -1.0], kind='movement', sparsity=0.5
    )
    step(layer, optimizer, [1.0, 1.0, 2.0, -1.0])
    # -w g: towards zero are 1 → 0.9, 3 → 2.8 and -1 → -0.9, away is -2 → -2.1.
    assert sparsifier.scores['weight'].tolist() == [[-1, 2, -6, -1]]
    sparsifier.decide(0.5)
    expected = torch.tensor([[0.9, -2.1, 0.0, 0.0]]).double()
    torch.testing.assert_close(layer.weight.detach(), expected)
    step(layer, optimizer, [1.0, 0.0, -5.0, 0.0])
    # The third scores by the value it had: -6 - 2.8 · (-5).
    scores = torch.tensor([[-1.9, 2.0, 8.0, -1.0]]).double()
    torch.testing.assert_close(sparsifier.scores['weight'], scores)
    sparsifier.decide(0.5)
    expected = torch.tensor([[0.0, -2.1, 2.8, 0.0]]).double()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_movement_without_a_step_decides_nothing():
    """As where a loss scaler skips all steps: by order, the last layers would go."""
    run = Run(kind='movement')
    words = r'begin must be after a step of the optimizer \(got scores of 0 alone\)'
    with pytest.raises(StatisticsError, match=words):
        run.sparsifier.decide(0.5)
    assert not any(counts(run.zeros()))


# -- SR-STE -------------------------------------------------------------------


def test_gradient_of_sr_ste_by_hand():
    """W ← W - lr (∂L/∂W̃ + decay (1 - mask) W), where W̃ = mask · W."""
    layer, optimizer, sparsifier = linear([4.0, -3.0, 2.0, -1.0], kind='nm', decay=0.5)
    sparsifier.decide(0.5)
    assert layer.weight.tolist() == [[4, -3, 0, 0]]
    step(layer, optimizer, [10.0, 20.0, -10.0, 30.0])
    dense = [4 - 1.0, -3 - 2.0, 2 - 0.1 * (-10 + 0.5 * 2), -1 - 0.1 * (30 - 0.5 * 1)]
    torch.testing.assert_close(
        sparsifier.aside['weight'], torch.tensor([dense]).double()
    )
    expected = torch.tensor([[0, dense[1], 0, dense[3]]]).double()
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize('accumulated', [1, 3])
def test_sr_ste_equals_a_reference_with_dense_weights(accumulated):
    """As the paper's code has it: a product of mask and weight in each pass."""
    torch.manual_seed(0)
    images = torch.randn(6, accumulated, 16).double()
    weight = nn.Parameter(torch.randn(3, 16).double())
    layer = nn.Linear(16, 3, bias=False).double()
    layer.weight.data.copy_(weight)
    sgd = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    reference = torch.optim.SGD([weight], **sgd)
    optimizer = torch.optim.SGD(layer.parameters(), **sgd)
    sparsifier = build_sparsifier(layer, SparsityConfig(kind='nm', decay=0.3))
    sparsifier.attach(optimizer)
    sparsifier.decide(0.5)
    masks = []
    for batches in images:
        mask = keep_n_of_m(weight, 2, 4)
        sparse = (weight * mask).detach().requires_grad_()
        for batch in batches:
            F.linear(batch, sparse).square().sum().backward()
            layer(batch).square().sum().backward()
        weight.grad = sparse.grad + 0.3 * ~mask * weight.detach()
        for each in (reference, optimizer):
            each.step()
        torch.testing.assert_close(sparsifier.aside['weight'], weight.detach())
        masks.append(mask)
        optimizer.zero_grad()
    assert not torch.equal(masks[0], masks[-1])  # weights do change places


@pytest.mark.parametrize('kind', ['movement', 'nm'])
def test_scale_that_a_fused_optimizer_undoes(kind):
    """Scores are free of it; the term of decay gets it, as all gradients have it."""
    found = []
    for scale in (1.0, 1024.0):
        layer, optimizer, sparsifier = linear([4.0, -3, 2, -1], kind=kind)
        if kind == 'nm':
            sparsifier.decide(0.5)
        layer.weight.grad = torch.tensor([[1.0, 2, 3, 4]]).double() * scale
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.found_inf = torch.tensor(0.0)
        before_step(optimizer)
        scores = getattr(sparsifier, 'scores', {'weight': layer.weight.grad / scale})
        found.append(scores['weight'])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize('kind', ['movement', 'nm'])
def test_step_that_a_fused_optimizer_skips_changes_nothing(kind):
    layer, optimizer, sparsifier = linear([4.0, -3, 2, -1], kind=kind, sparsity=None)
    step(layer, optimizer, [1.0, 2, 3, 4])
    sparsifier.decide(0.5)
    before = saved_and_loaded([sparsifier.state_dict(), layer.state_dict()])
    layer.weight.grad = torch.full((1, 4), float('inf')).double()
    optimizer.found_inf = torch.tensor(1.0)
    before_step(optimizer)
    after_step(optimizer)
    after = saved_and_loaded([sparsifier.state_dict(), layer.state_dict()])
    assert plain_lists(after) == plain_lists(before)
    assert before[0]['aside']['weight'].all()


def before_step(optimizer):
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook(optimizer, (), {})


def after_step(optimizer):
    for hook in optimizer._optimizer_step_post_hooks.values():
        hook(optimizer, (), {})


@pytest.mark.parametrize('options', KINDS, ids=ids)
def test_optimizers_that_compute_gradients_themselves(options):
    run = Run(**options)
    optimizer = torch.optim.LBFGS(run.model.parameters())
    run.sparsifier.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = run.model(run.images).square().sum()
        loss.backward()
        return loss

    if hasattr(run.sparsifier, 'aside'):
        words = r"kind must be 'magnitude' for an optimizer .*closure for LBFGS\); use"
        with pytest.raises(ConfigError, match=words):
            optimizer.step(closure)
    else:
        run.sparsifier.decide(0.25)
        optimizer.step(closure)
        gone = {name: ~mask for name, mask in run.sparsifier.masks.items()}
        assert counts(run.zeros()) == counts(gone)


# -- state --------------------------------------------------------------------


@pytest.mark.parametrize('options', KINDS, ids=ids)
@pytest.mark.parametrize('begun', [True, False])
def test_resumed_run_goes_on_bit_for_bit(options, begun):
    whole = Run(**options)
    whole.sparsifier.attach(whole.optimizer)
    whole.train(2)
    if begun:
        whole.sparsifier.decide(0.5)
        whole.train(2)
    parts = ('model', 'optimizer', 'sparsifier')
    state = saved_and_loaded({p: getattr(whole, p).state_dict() for p in parts})
    resumed = Run(seed=1, **options)
    resumed.sparsifier.load_state_dict(state['sparsifier'])  # before the weights
    resumed.model.load_state_dict(state['model'])
    resumed.optimizer.load_state_dict(state['optimizer'])
    resumed.sparsifier.attach(resumed.optimizer)
    resumed.images = whole.images
    for run in (whole, resumed):
        run.train(2)
        run.sparsifier.decide(run.sparsifier.config.density)
        run.train(2)
    ends = [
        saved_and_loaded({p: getattr(run, p).state_dict() for p in parts})
        for run in (whole, resumed)
    ]
    assert pickle.dumps(plain_lists(ends[0])) == pickle.dumps(plain_lists(ends[1]))


def plain_lists(tree):
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, list):
        return [plain_lists(value) for value in tree]
    if isinstance(tree, dict):
        return {key: plain_lists(value) for key, value in tree.items()}
    return tree


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda s: s.update(version=9), r'sparsity of version 1 \(got version 9\)'),
        (lambda s: s['options'].update(m=8), r'm must be 8 \(got 4\); resume with'),
        (lambda s: s['masks'].pop('3.weight'), 'ValueError: masks of other weights'),
        (lambda s: s.pop('masks'), "state of sparsity of this model .*'masks'"),
        (
            lambda s: s['masks'].update({'3.weight': s['masks']['1.weight']}),
            'a mask of another size for 3.weight',
        ),
        (lambda s: s['aside'].pop('3.weight'), "KeyError: '3.weight'"),
        (
            lambda s: s['aside'].update({'3.weight': torch.ones(3)}),
            'checkpoint must be a state of sparsity of this model .*shape',
        ),
    ],
)
def test_damaged_states_are_refused_in_one_line(change, words):
    run = Run(kind='nm')
    run.sparsifier.decide(0.5)
    state = saved_and_loaded(run.sparsifier.state_dict())
    change(state)
    with pytest.raises(ConfigError, match=words) as caught:
        Run(kind='nm').sparsifier.load_state_dict(state)
    assert '\n' not in str(caught.value)


def test_copies_are_refused():
    with pytest.raises(ConfigError, match='a Magnitude cannot be copied or pickled'):
        copy.deepcopy(Run().sparsifier)
