"""What long runs meet: bad losses, missing boxes, missing gradients, wrong files."""

import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from support.configs import slim_retinanet, small_prune_config
from support.pruning import (
    hooks_on,
    importance_of,
    iterate,
    prepared,
    seen_by,
    warnings_of,
)
from support.reference import mask_fisher
from support.roundtrip import without_boxes
from support.toy_runner import Call, pruner_of, toy_loader, toy_runner
from support.toys import ConvPair, TinyDetector, images, square_loss, toy_forward

from mmgfp import GroupFisherPruner
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.utils.errors import ConfigError, StatisticsError, StructureError


class Factors(Hook):
    """Multiplies the loss of each iteration.

    Args:
        factors: The factors; further iterations have the last one.
    """

    priority = 'LOWEST'

    def __init__(self, *factors):
        self.factors = factors

    def before_train_iter(self, runner, *args, **kwargs):
        factor = self.factors[min(runner.iter, len(self.factors) - 1)]
        runner.model.factor = factor


NAN, INF = float('nan'), float('inf')
#: A wrapper whose scaler skips steps with gradients that are not finite.
SKIPPING = dict(type='CpuAmpOptimWrapper', scaler=dict(init_scale=1.0))


# -- losses that are not finite -------------------------------------------------


def test_bad_iterations_are_dropped_counted_and_survived(tmp_path, caplog):
    hooks = [Factors(1, NAN, INF, 1, -INF, 1)]
    hook = dict(max_nonfinite=3, target=dict(flops=0.2))
    runner = toy_runner(tmp_path, iters=8, hooks=hooks, optim=SKIPPING, hook=hook)
    with caplog.at_level('WARNING', 'mmgfp'):
        runner.train()
    assert pruner_of(runner).criterion.state_dict()['nonfinite'].tolist() == [3, 0]
    assert (~pruner_of(runner).units.kept).sum() == 4
    said = [r.message for r in caplog.records if 'not finite' in r.message]
    words = 'gradients were not finite in {} iterations so far, which do not count'
    assert said == [words.format(n) for n in (1, 2, 3)]


def test_a_run_of_bad_iterations_stops(tmp_path):
    """Plain SGD takes NaN into the weights at once."""
    hooks, hook = [Factors(1, 1, 1, NAN, 1)], dict(max_nonfinite=3)
    runner = toy_runner(tmp_path, iters=20, hooks=hooks, hook=hook)
    words = (
        'gradients must be finite ones (got NaN or infinity in the last 3 '
        'iterations); look at the loss, lower the learning rate or clip gradients; '
        'max_nonfinite sets how many are tolerated'
    )
    with pytest.raises(StatisticsError) as caught:
        runner.train()
    assert str(caught.value) == words
    assert runner.iter == 5


def test_bad_iterations_are_as_if_they_had_not_been():
    """Nothing of them is in the sums, whichever units they touch."""
    torch.manual_seed(0)
    pruner = prepared(TinyDetector().double())
    iterate(pruner)
    expected = importance_of(pruner)
    poisoned = images().double()
    poisoned[1, 0, 3, 3] = NAN
    for batch, factor in ((poisoned, 1), (images().double(), INF)):
        iterate(pruner, lambda m, x=batch, by=factor: square_loss(m(x)) * by)
    assert (importance_of(pruner) == expected).all()
    assert (seen_by(pruner) == 1).all()


@pytest.mark.parametrize('value', [0, -1, 2.5, True])
def test_max_dropped_must_be_a_number(value):
    words = rf'max_nonfinite must be a whole number of at least 1 \(got {value}'
    with pytest.raises(ConfigError, match=words):
        GroupFisherPruner(ConvPair(), max_nonfinite=value)


# -- images without boxes, heads without gradients --------------------------------


@pytest.fixture(scope='module')
def retinanet():
    return slim_retinanet()


def test_image_without_boxes(retinanet):
    model, calls = retinanet
    calls = without_boxes(calls, 0)
    pruner = prepared(model.train(), calls.loss, calls.forward)
    iterate(pruner, calls.loss)
    found = importance_of(pruner)
    pruner.close()
    expected = mask_fisher(model, calls.loss, pruner.units.grouping.groups, 2).numpy()
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3 * float(expected.max()))
    assert (seen_by(pruner) == 1).all()


def test_batches_without_boxes_do_not_cost_the_box_tower_its_channels(retinanet):
    """Its loss is a sum times zero then, which says nothing about importance."""
    model, calls = copy.deepcopy(retinanet)
    pruner = prepared(model, calls.loss, calls.forward, interval=2, units_per_step=40)
    empty = without_boxes(calls, 0, 1)
    for _ in range(2):
        step = iterate(pruner, lambda model: empty.loss(model.train()))
    names = [g.name for g in pruner.units.grouping.groups]
    gone = dict(zip(names, pruner.units.removed, strict=True))
    tower = [n for n in names if n.startswith('bbox_head.reg_convs')]
    assert len(step.units) == 40 and len(tower) == 4
    assert not any(gone[n] for n in tower)
    said = '\n'.join(warnings_of(pruner))
    assert any(f'group {n} got no gradient in 2' in said for n in tower)


def test_a_batch_says_whether_it_has_boxes(retinanet):
    _, calls = retinanet
    assert not calls.without_boxes
    assert not without_boxes(calls, 0).without_boxes
    assert without_boxes(calls, 0, 1).without_boxes


def test_pruning_begins_with_the_first_batch_that_has_boxes(tmp_path, monkeypatch):
    flags = iter([True, True, False])
    monkeypatch.setattr(BatchCalls, 'without_boxes', property(lambda _: next(flags)))
    config = small_prune_config(tmp_path)
    config.train_cfg.max_iters = 3
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.iter == 3 and pruner_of(runner).iteration == 1


def test_first_batch_without_boxes_finds_the_same_groups(retinanet):
    model, calls = retinanet
    names = []
    for own in (calls, without_boxes(calls, 0, 1)):
        pruner = GroupFisherPruner(model)
        names.append([g.name for g in pruner.prepare(own.loss, own.forward, 2).groups])
        pruner.close()
    missing = set(names[0]) - set(names[1])
    assert set(names[1]) <= set(names[0])
    assert all(n.startswith('bbox_head.reg_convs') for n in missing)


class TwoHeads(torch.nn.Module):
    """A stem that two heads read, which lose by turns."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 6, 1)
        self.left, self.right = ConvPair(), ConvPair()
        for head in (self.left, self.right):
            head.conv1 = torch.nn.Conv2d(6, 6, 3, bias=False)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.left(x), self.right(x)


def test_head_without_gradient_in_some_iterations_counts_in_the_others():
    torch.manual_seed(0)
    model = TwoHeads().double()
    pruner = prepared(model)
    groups, expected = pruner.units.grouping.groups, 0
    for used in ((0, 1), (0,), (1,), (0,)):

        def loss(model, used=used):
            outputs = toy_forward(model)
            return square_loss(tuple(outputs[i] for i in used))

        pruner.criterion.tap.detach()
        expected += mask_fisher(model, loss, groups, 2).numpy()
        pruner.criterion.tap.attach()
        iterate(pruner, loss)
    assert importance_of(pruner) == pytest.approx(expected, rel=1e-5)
    seen = dict(zip((g.name for g in groups), seen_by(pruner), strict=True))
    assert seen == {'stem': 4, 'left.conv1': 3, 'right.conv1': 2}


def test_uneven_last_batch_counts_each_of_its_images(tmp_path):
    """Five images in batches of two, without a step: 2, 2, 1."""
    totals = []

    def watch(runner):
        totals.append(importance_of(pruner_of(runner)))

    runner = toy_runner(
        tmp_path,
        hooks=[Call(after_train_iter=watch)],
        hook=dict(interval=10**6),
        optim=dict(optimizer=dict(type='SGD', lr=0.0)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
        train_dataloader=toy_loader(2, count=5),
    )
    runner.train()
    model, groups = runner.model, pruner_of(runner).units.grouping.groups
    data, expected = runner.train_dataloader.dataset.images, 0
    for n, batch in enumerate(data.split(2)):

        def loss(model, batch=batch):
            return model(batch, mode='loss')['loss']

        expected += mask_fisher(model, loss, groups, len(batch)).numpy()
        assert totals[n] == pytest.approx(expected, rel=1e-5)
    assert len(totals) == 3


def test_batch_without_images_is_harmless():
    torch.manual_seed(0)
    pruner = prepared(TinyDetector().double().eval())
    iterate(pruner, lambda m: sum(o.sum() for o in m(images()[:0].double())))
    assert not importance_of(pruner).any() and not seen_by(pruner).any()
    iterate(pruner)
    assert (seen_by(pruner) == 1).all()


# -- checkpoints of something else ------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run that was not finished: its checkpoint and its compact weights."""
    folder = tmp_path_factory.mktemp('trained')
    checkpoint = dict(type='CheckpointHook', interval=4, by_epoch=False)
    hooks = dict(logger=None, checkpoint=checkpoint)
    runner = toy_runner(folder, iters=4, default_hooks=hooks)
    runner.train()
    (compact,) = (folder / 'work').glob('*_unfinished.pth')
    return folder / 'work' / 'iter_4.pth', compact


@pytest.mark.parametrize('resume', [False, True])
def test_compact_weights_are_not_loaded_into_the_full_model(tmp_path, trained, resume):
    words = (
        r'checkpoint: net\.\w+\.\w+ must be of shape \[.*\] as in the model that is '
        r'pruned \(got \[.*\]\); give a checkpoint of that model; one that was cut'
    )
    runner = toy_runner(tmp_path, load_from=str(trained[1]), resume=resume)
    with pytest.raises(StructureError, match=words) as caught:
        runner.train()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda weights: None, None),
        (lambda weights: weights.pop('net.stem.weight'), 'no net.stem.weight of its'),
        (
            lambda weights: weights.update({'net.stem.weight': torch.ones(2, 3, 3, 3)}),
            'no net.stem.weight of its shape); these',
        ),
        (
            lambda weights: weights.clear(),
            'more); these are left as they were initialised',
        ),
    ],
    ids=['whole', 'missing', 'narrow', 'empty'],
)
def test_weights_that_load_from_lacks_are_counted(tmp_path, trained, change, words):
    weights = torch.load(trained[0], weights_only=False)['state_dict']
    change(weights)
    torch.save({'state_dict': dict(weights)}, tmp_path / 'weights.pth')
    load_from = str(tmp_path / 'weights.pth')
    toy_runner(tmp_path, iters=1, load_from=load_from).train()
    (log,) = (tmp_path / 'work').glob('*/*.log')
    lines = [x for x in log.read_text().splitlines() if 'load_from must hold' in x]
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]


def resumed_with(tmp_path, path, change):
    """Return a runner that resumes a checkpoint which has been tampered with."""
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint)
    changed = tmp_path / 'changed.pth'
    torch.save(checkpoint, changed)
    return toy_runner(tmp_path, load_from=str(changed), resume=True)


def rename_a_member(checkpoint):
    group = checkpoint['pruner']['discovery']['groups'][0]
    group['members'][0]['name'] = 'backbone.conv1.weight'


def narrow_the_kernel(checkpoint):
    weights = checkpoint['state_dict']
    weights['net.stem.weight'] = weights['net.stem.weight'][..., 1:2, 1:2]


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (
            narrow_the_kernel,
            'checkpoint: net.stem.weight must be of shape [4, 3, 3, 3] as in the model '
            'that is pruned (got [4, 3, 1, 1]); resume with the configuration that the '
            'run was started with',
        ),
        (
            lambda c: c['pruner'].update(version=99),
            'checkpoint must be a pruning state of version 2 (got version 99); '
            'start pruning anew from the weights, with load_from',
        ),
        (
            rename_a_member,
            'checkpoint must be the groups of coupled channels of this model (got '
            "KeyError: 'backbone.conv1.weight'); resume with the configuration that "
            'the run was started with',
        ),
        (
            lambda c: c['exact_resume'].update(version=99),
            'checkpoint: exact_resume.version must be 1 (got 99); resume with the '
            'version of mmgfp that the run was started with',
        ),
    ],
)
def test_state_of_something_else_is_refused(tmp_path, trained, change, words):
    runner = resumed_with(tmp_path, trained[0], change)
    with pytest.raises(ConfigError) as caught:
        runner.train()
    assert str(caught.value) == words
    if 'exact_resume' not in words:  # another hook refuses that, later
        assert hooks_on(runner.model) == 0


def test_untouched_checkpoint_resumes(tmp_path, trained):
    """The tests above would pass with any checkpoint otherwise."""
    state = torch.load(trained[0], weights_only=False)['pruner']
    assert not state['kept'].all()
    resumed_with(tmp_path, trained[0], lambda c: None).train()
