"""Averaged copies inside a model shrink with their originals."""

import numpy as np
import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from support.toys import ConvPair, grouped, images, reasons_of, square_loss, toy_forward
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmgfp.discovery.discover import discover, trace_model
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, masked_and_compact
from mmgfp.surgery.masking import ColumnMask
from mmgfp.tracing.averaged_copies import averaged_copy_tensors


class Contrast(nn.Module):
    """Compares a network with its averaged copy, as contrastive learning does."""

    def __init__(self, averaged):
        super().__init__()
        self.net = ConvPair()
        self.neck = nn.Conv2d(4, 2, 1)
        self.copy = averaged(nn.Sequential(self.net, self.neck))

    def forward(self, x):
        with torch.no_grad():
            self.copy.update_parameters(nn.Sequential(self.net, self.neck))
            target = self.copy(x)
        return self.neck(self.net(x).relu()), target


def momentum(module):
    return ExponentialMovingAverage(module, 0.1)


AVERAGED = pytest.mark.parametrize('averaged', [momentum, AveragedModel])


@AVERAGED
def test_copies_are_found_with_their_originals(averaged):
    copies = averaged_copy_tensors(Contrast(averaged))
    assert copies['net.conv1.weight'] == ['copy.module.0.conv1.weight']
    assert copies['net.bn.running_mean'] == ['copy.module.0.bn.running_mean']
    assert copies['neck.bias'] == ['copy.module.1.bias']
    assert len(copies) == len(ConvPair().state_dict()) + 2


def loss(model):
    outputs, target = model(images())
    return (outputs - target).square().sum()


@AVERAGED
def test_units_take_their_copies_along(averaged):
    torch.manual_seed(0)
    model = Contrast(averaged)
    grouping = grouped(model, loss)
    units = [(g.name, g.units) for g in grouping.groups]
    assert units == [('net.conv1', 6), ('net.conv2', 4)]
    roles = {(m.name, m.dim): m.role for m in grouping.groups[0].members}
    assert roles['copy.module.0.conv1.weight', 0] == 'out'
    assert roles['copy.module.0.conv2.weight', 1] == 'in'
    assert roles['copy.module.0.bn.running_var', 0] == 'with'
    assert {f.layer for f in grouping.frozen} == {'neck', 'copy.module.1'}


class Predicting(Contrast):
    """Predicts the copy's output from the network's, through a further layer."""

    def __init__(self, averaged):
        super().__init__(averaged)
        self.predictor = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y, target = super().forward(x)
        return self.predictor(y.relu()), target


def test_what_leaves_a_copy_keeps_its_width():
    grouping = grouped(Predicting(momentum), loss)
    assert [g.name for g in grouping.groups] == ['net.conv1', 'net.conv2']
    assert reasons_of(grouping)['neck'] == 'an output of an averaged copy'


@AVERAGED
def test_masked_and_compact_stay_alike_while_the_copy_follows(averaged):
    torch.manual_seed(0)
    model = Contrast(averaged)
    groups = grouped(model, loss).groups
    kept = random_units(groups, 0.4, np.random.default_rng(0))
    assert disagreement(model, groups, kept, toy_forward) is None
    pair = masked_and_compact(model.double(), groups, kept)
    masks = ColumnMask(pair[0], groups)
    masks.update(kept)
    for _ in range(3):
        losses = []
        for one in pair:
            optimizer = torch.optim.SGD(one.parameters(), 0.01)
            optimizer.zero_grad()
            outputs, target = one(images().double())
            losses.append(square_loss(outputs - target + 1))
            losses[-1].backward()
            optimizer.step()
        masks.apply()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)


@torch.no_grad()
def in_place(mine, other):
    mine.mul_(0.9).add_(0.1 * other)


def behind_autograd(mine, other):
    mine.data.mul_(0.9).add_(0.1 * other.data)


def replaced(mine, other):
    mine.data = mine.data * 0.9 + other.data * 0.1


class Taught(nn.Module):
    """Learns from a copy that its own code updates, parameter by parameter."""

    def __init__(self, follow):
        super().__init__()
        self.net = ConvPair()
        self.teacher = ConvPair().requires_grad_(False)
        self.neck = nn.Conv2d(4, 2, 1)
        self.follow = follow

    def forward(self, x):
        return self.neck(self.net(x).relu())

    def loss(self):
        with torch.no_grad():
            target = self.teacher(images())
            pairs = zip(self.teacher.parameters(), self.net.parameters(), strict=True)
            for mine, other in pairs:
                self.follow(mine, other)
        outputs = self(images())
        return (outputs.mean(1) - target.mean(1)).square().sum()


@pytest.mark.parametrize('follow', [in_place, behind_autograd, replaced])
def test_copies_that_the_model_updates_itself(follow):
    torch.manual_seed(0)
    model = Taught(follow)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = discover(model, Taught.loss, toy_forward, 2).grouping
    assert [(g.name, g.units) for g in found.groups] == [('net.conv1', 6)]
    roles = {(m.name, m.dim): m.role for m in found.groups[0].members}
    assert roles['teacher.conv1.weight', 0] == 'out'
    assert roles['teacher.conv2.weight', 1] == 'in'
    assert reasons_of(found)['net.conv2'] == 'an output of an averaged copy'
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def limited(mine, other):
    mine.data = torch.renorm(mine.data.flatten(1), 2, 0, 0.1).view_as(mine)


@torch.no_grad()
def clamped(mine, other):
    mine.clamp_(-0.1, 0.1)


@torch.no_grad()
def decayed(mine, other):
    mine.mul_(0.9)


def unknown(mine, other):
    mine.data.fill_(float('nan'))


@pytest.mark.parametrize('change', [limited, clamped, decayed, unknown])
def test_a_frozen_twin_that_does_not_follow_keeps_its_channels(change):
    torch.manual_seed(0)

    def follow(mine, other):
        if mine.dim() == 4:
            change(mine, other)

    grouping = build_groups_of(Taught(follow))
    assert [g.name for g in grouping.groups] == ['net.conv1', 'net.conv2']
    assert not any(m.name.startswith('t') for g in grouping.groups for m in g.members)


def build_groups_of(model):
    return build_groups(model, trace_model(model, Taught.loss, images=2).trace)


class TaughtTwice(Taught):
    """Has two networks of one class; the teacher is the second one's."""

    def __init__(self):
        super().__init__(in_place)
        self.net, self.first = ConvPair(), self.net

    def forward(self, x):
        return self.neck((self.first(x) + self.net(x)).relu())


def test_a_copy_goes_with_the_one_that_it_follows():
    torch.manual_seed(0)
    groups = {g.name: g.members for g in build_groups_of(TaughtTwice()).groups}
    assert set(groups) == {'first.conv1', 'net.conv1'}
    assert any(m.name == 'teacher.conv1.weight' for m in groups['net.conv1'])
    assert not any(m.name.startswith('teacher') for m in groups['first.conv1'])


def test_a_frozen_twin_that_nothing_updates_keeps_its_channels():
    found = discover(Taught(lambda mine, other: None), Taught.loss, toy_forward, 2)
    assert [g.name for g in found.grouping.groups] == ['net.conv1', 'net.conv2']
    members = {m.name for g in found.grouping.groups for m in g.members}
    assert not any(name.startswith('teacher') for name in members)
