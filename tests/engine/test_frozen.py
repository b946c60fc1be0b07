"""Frozen stages and norms, SyncBN and channels_last: what the statistics become."""

import copy

import numpy as np
import pytest
import torch
from support.configs import slim_retinanet
from support.pruning import importance_of, iterate, prepared
from support.reference import mask_fisher
from support.toys import ResidualPair, TinyDetector, images, toy_loss
from torch import nn

from mmgfp import PruningConfig
from mmgfp.discovery.comparing import difference
from mmgfp.selection.schedules import FixedSchedule


def observed(model, loss=toy_loss, forward=None):
    """A pruner after one iteration, and its importance by group."""
    pruner = prepared(model.train(), loss, forward)
    iterate(pruner, loss)
    groups = pruner.units.grouping.groups
    ends = np.cumsum([g.units for g in groups])[:-1]
    parts = np.split(importance_of(pruner), ends)
    return pruner, {g.name: p for g, p in zip(groups, parts, strict=True)}


def now_prune(pruner, units):
    """Let a pruner that only watched decide after each iteration."""
    pruner.config = PruningConfig.of(pruner.config, interval=1)
    pruner.schedule = FixedSchedule(units)


def test_group_of_a_frozen_stage_is_left_alone_and_the_others_count_the_same(caplog):
    """frozen_stages=1 freezes the stem and the first stage, with their norms."""
    found, pruners = [], []
    for frozen in (-1, 1):
        model, calls = slim_retinanet(frozen_stages=frozen, norm_eval=True)
        caplog.clear()
        pruner, importance = observed(model, calls.loss, calls.forward)
        pruners.append(pruner)
        found.append(importance)
    free, frozen = found
    assert list(free) == list(frozen)
    blind = {n for n in frozen if not frozen[n].any()}
    assert blind == {f'backbone.{n}conv1' for n in ('', 'layer1.0.', 'layer1.1.')}
    for name in frozen.keys() - blind:
        assert frozen[name] == pytest.approx(free[name], rel=1e-4)
    assert 'its input needs no gradient, as behind frozen layers' in caplog.text

    pruner = pruners[1]
    now_prune(pruner, 20)
    for _ in range(3):
        iterate(pruner, calls.loss)
    gone = dict(zip(frozen, pruner.units.removed, strict=True))
    assert not any(gone[n] for n in blind) and sum(gone.values()) == 60
    for name in blind:
        words = f'group {name} got no gradient in 1 iterations and is left alone'
        assert caplog.text.count(words) == 1


def test_group_with_some_frozen_readers_is_left_alone(caplog):
    """conv1 reads the frozen stem, head reads the sum of stem and conv2."""
    torch.manual_seed(0)
    model = ResidualPair().double()
    model.stem.requires_grad_(False)
    pruner, importance = observed(model)
    assert not importance['stem'].any() and importance['conv1'].all()
    assert 'the inputs of conv1 are not counted in some iterations' in caplog.text
    now_prune(pruner, 1)
    for _ in range(2):
        iterate(pruner)
    assert pruner.units.removed.tolist() == [0, 2]
    assert 'group stem got no gradient' in caplog.text


def test_frozen_head_leaves_statistics_as_they_are():
    """Gradients flow through frozen layers to the trained ones before them."""
    torch.manual_seed(0)
    model = TinyDetector().double()
    _, expected = observed(copy.deepcopy(model))
    for part in (model.fpn1, model.cls_tower, model.cls_pred):
        part.requires_grad_(False)
    _, found = observed(model)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-9)


def test_frozen_norms_have_the_statistics_of_the_paper():
    """Norms in eval mode whose parameters need no gradient."""
    torch.manual_seed(0)
    model = TinyDetector().double()
    model.bn.requires_grad_(False)
    model.bn.running_mean.uniform_(-0.2, 0.2)
    model.bn.train = lambda mode=True: model.bn
    model.bn.training = False
    pruner, _ = observed(model)
    found = importance_of(pruner)
    pruner.close()
    expected = mask_fisher(model, toy_loss, pruner.units.grouping.groups, 2)
    assert found == pytest.approx(expected.numpy(), rel=1e-6)


def test_sync_bn_of_one_process_is_batch_norm():
    torch.manual_seed(0)
    model = TinyDetector().double()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronised.bn) is nn.SyncBatchNorm
    plain, expected = observed(model)
    pruner, found = observed(synchronised)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
    pruner.units.kept[[0, 5, 20]] = plain.units.kept[[0, 5, 20]] = False
    small = pruner.compact()
    assert type(small.bn) is nn.SyncBatchNorm and small.bn.num_features == 3
    with torch.no_grad():
        outputs = [m.eval()(images().double()) for m in (plain.compact(), small)]
    assert difference(*outputs) < 1e-6


def test_channels_last_changes_no_statistics():
    model, calls = slim_retinanet()
    _, expected = observed(copy.deepcopy(model), calls.loss, calls.forward)
    model.to(memory_format=torch.channels_last)
    calls.data['inputs'] = calls.data['inputs'].to(memory_format=torch.channels_last)
    pruner, found = observed(model, calls.loss, calls.forward)
    for name in expected:
        scale = expected[name].max()
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-3 * scale)
    now_prune(pruner, 1)
    iterate(pruner, calls.loss)
    small = pruner.compact()
    with torch.no_grad():
        outputs = [calls.forward(m) for m in (model, small)]
    assert difference(*outputs) < 1e-4
