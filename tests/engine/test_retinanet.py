"""RetinaNet R50-FPN of MMDetection: what is coupled, and that it can shrink."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.hub import get_config
from support.toys import parameters_in, widths

from mmgfp.discovery.comparing import difference
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.pruner import GroupFisherPruner
from mmgfp.surgery.compact import compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.tracing import trace_loss
from mmgfp.utils.trial_runs import all_parameters_require_grad, undisturbed


@pytest.fixture(scope='module')
def retinanet():
    """The detector, its calls on two images of 128 x 128, and its groups."""
    torch.manual_seed(0)
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.model.backbone.frozen_stages = -1
    model = build_model(cfg)
    calls = BatchCalls(model, demo_batch(cfg, images=2, size=(128, 128)))
    with undisturbed(model), all_parameters_require_grad(model):
        trace = trace_loss(model, calls.loss(model), strict=True)
    return model, calls, build_groups(model, trace)


def group(grouping, name):
    (found,) = [g for g in grouping.groups if g.name == name]
    return found


def test_all_but_the_predictors_can_be_pruned(retinanet):
    _, _, grouping = retinanet
    assert len(grouping.groups) == 47
    assert grouping.units == 14_016
    reason = 'an output: reaches the loss without a further layer'
    assert [(f.layer, f.channels, f.reason) for f in grouping.frozen] == [
        ('bbox_head.retina_cls', 720, reason),
        ('bbox_head.retina_reg', 36, reason),
    ]


def test_units_add_up(retinanet):
    """By hand: the stem; of a stage, one coupled output and two convs in each block.

    Then the FPN's laterals, its outputs P3 to P7, and four convs on both branches of
    the head.
    """
    _, _, grouping = retinanet
    expected = Counter({64: 1}) + Counter({256: 1 + 1 + 2 * 4})
    for width, blocks in {64: 3, 128: 4, 256: 6, 512: 3}.items():
        expected += Counter({4 * width: 1}) + Counter({width: 2 * blocks})
    assert Counter(g.units for g in grouping.groups) == expected
    assert sum(units * count for units, count in expected.items()) == 14_016


def test_the_stem(retinanet):
    _, _, grouping = retinanet
    norm = {('backbone.bn1.' + n, 0): 1 for n in ('weight', 'bias')}
    running = {('backbone.bn1.running_' + n, 0): 1 for n in ('mean', 'var')}
    assert widths(grouping.groups[0]) == norm | running | {
        ('backbone.conv1.weight', 0): 1,
        ('backbone.layer1.0.conv1.weight', 1): 1,
        ('backbone.layer1.0.downsample.0.weight', 1): 1,
    }


def test_a_residual_stage(retinanet):
    _, _, grouping = retinanet
    stage = group(grouping, 'backbone.layer2.0.conv3')
    blocks = [f'backbone.layer2.{i}' for i in range(4)]
    assert stage.units == 512
    assert sorted(stage.layers('out')) == sorted(
        ['backbone.layer2.0.downsample.0'] + [f'{b}.conv3' for b in blocks]
    )
    assert sorted(stage.layers('in')) == sorted(
        [f'{b}.conv1' for b in blocks[1:]]
        + ['backbone.layer3.0.conv1', 'backbone.layer3.0.downsample.0']
        + ['neck.lateral_convs.0.conv']
    )


def test_the_pyramid(retinanet):
    _, _, grouping = retinanet
    laterals = group(grouping, 'neck.lateral_convs.0.conv')
    assert laterals.layers('out') == [f'neck.lateral_convs.{i}.conv' for i in range(3)]
    assert laterals.layers('in') == [f'neck.fpn_convs.{i}.conv' for i in range(3)]
    levels = group(grouping, 'neck.fpn_convs.0.conv')
    assert levels.layers('out') == [f'neck.fpn_convs.{i}.conv' for i in range(5)]
    assert sorted(levels.layers('in')) == [
        'bbox_head.cls_convs.0.conv',
        'bbox_head.reg_convs.0.conv',
        'neck.fpn_convs.4.conv',
    ]


@pytest.mark.parametrize('call', ['forward', 'loss'])
def test_half_of_the_units_can_go(retinanet, call):
    model, calls, grouping = retinanet
    kept = random_units(grouping.groups, 0.5, np.random.default_rng(0))
    assert kept.sum() == 14_016 / 2
    outputs = getattr(calls, call)
    assert disagreement(model, grouping.groups, kept, outputs) is None


def test_the_compact_detector(retinanet):
    model, calls, grouping = retinanet
    kept = random_units(grouping.groups, 0.5, np.random.default_rng(0))
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(model))
    small = compact(model, structure)
    assert type(small) is type(model)
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.backbone.conv1.weight.shape == (32, 3, 7, 7)
    assert small.neck.fpn_convs[0].out_channels == 128
    assert small.bbox_head.retina_cls.weight.shape == (720, 128, 3, 3)
    full, pruned = map(parameters_in, (model, small))
    assert full / 1e6 == pytest.approx(37.97, abs=0.005)  # as the paper counts it
    assert pruned / full == pytest.approx(0.25, abs=0.02)
    calls.loss(small.train()).backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.slow
def test_half_of_the_macs_go_by_fisher(retinanet):
    model, calls, _ = retinanet
    model = copy.deepcopy(model).train()
    options = dict(interval=1, units_per_step=800, target=dict(flops=0.5))
    pruner = GroupFisherPruner(model, **options)
    pruner.prepare(calls.loss, calls.forward, calls.images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    while not pruner.done:
        _train_once(model, optimizer, calls)
        pruner.step()
    assert pruner.units.totals['macs'] <= 0.5 * pruner.units.full['macs']
    small = pruner.compact()
    with torch.no_grad():
        outputs = [calls.forward(m.eval()) for m in (model, small)]
    assert difference(*outputs) < 1e-4
    small_optimizer = torch.optim.SGD(small.parameters(), lr=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):  # the second loss shows what the first step did
        masked = _train_once(model.train(), optimizer, calls)
        pruner.units.masks[0].apply()
        compacted = _train_once(small.train(), small_optimizer, calls)
        assert compacted == pytest.approx(masked, rel=1e-4)


def _train_once(model, optimizer, calls):
    loss = calls.loss(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
