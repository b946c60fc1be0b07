"""Two-stage detectors: statistics of RoIs, true widths, steady verification, costs."""

import copy
import json

import numpy as np
import pytest
import torch
from mmengine.runner import Runner, load_checkpoint
from mmengine.structures import InstanceData
from support.configs import (
    CASCADE,
    DOUBLE,
    FASTER,
    GRID,
    MASK,
    full,
    slim,
    small_prune_config,
)
from support.pruning import importance_of, iterate, seen_by, warnings_of
from support.reference import mask_fisher
from support.roundtrip import assert_prunes, pruned_model, traced, without_boxes
from support.toys import reasons_of
from torch import nn

from mmgfp import GroupFisherPruner, PruneStructure
from mmgfp.discovery.comparing import difference
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement, find_disagreements, masked_and_compact
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.engine.two_stage import fixed_proposals, rois_per_image
from mmgfp.selection.costs import CostTable
from mmgfp.surgery.fit import check_fits
from mmgfp.surgery.structure import shapes_of
from mmgfp.utils.errors import StructureError


@pytest.fixture(scope='module')
def mask_rcnn():
    """A slim Mask R-CNN in double precision and the calls on a batch of two images."""
    torch.manual_seed(0)
    model, calls = built(slim(MASK), (64, 96))
    model.double()
    calls.data['inputs'] = calls.data['inputs'].double()
    return model, calls, ready(model, calls, steady(calls))


def built(config, size=(64, 64)):
    """The model of a config, and the calls on a batch of two images."""
    model = build_model(config)
    return model, BatchCalls(model, demo_batch(config, 2, size))


def ready(model, calls, loss=None, **options):
    """A pruner of the model that never prunes, with true costs of the RoIs."""
    pruner = GroupFisherPruner(model, interval=10**6, **options)
    pruner.prepare(loss or calls.loss, calls.forward, 2, calls.profile(model))
    return pruner


def steady(calls):
    """The loss on the same RoIs and samples at each call."""

    def loss(model):
        torch.manual_seed(0)
        return calls.steady_loss(model)

    return loss


def observed(pruner, loss):
    """Importance of all units after one iteration on ``loss``, (U,)."""
    pruner.criterion.clear()
    pruner.model.zero_grad()
    iterate(pruner, loss)
    return torch.from_numpy(importance_of(pruner))


def assert_close(a, b):
    assert a.numpy() == pytest.approx(b.numpy(), rel=1e-4, abs=1e-7 * float(b.max()))


def assert_all_seen(pruner):
    assert (seen_by(pruner) == 1).all() and not warnings_of(pruner)


def cut_at_random(model, pruner):
    """Units that stay when 30 % go, and the masked and the compact model."""
    groups = pruner.units.grouping.groups
    kept = random_units(groups, 0.3, np.random.default_rng(0))
    pruner.criterion.tap.detach()
    pair = masked_and_compact(model, groups, kept)
    pruner.criterion.tap.attach()
    return kept, *pair


# -- groups ------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, groups, units',
    [
        (FASTER, 42, 14_272),
        pytest.param(MASK, 47, 15_552, marks=pytest.mark.slow),
        pytest.param(CASCADE, 61, 22_208, marks=pytest.mark.slow),
        pytest.param(DOUBLE, 52, 17_600, marks=pytest.mark.slow),
    ],
)
def test_only_the_final_predictors_keep_their_outputs(name, groups, units):
    torch.manual_seed(0)
    model, calls = built(full(name))
    pruner = ready(model, calls, strict=True)
    grouping = pruner.units.grouping
    assert len(grouping.groups) == groups and grouping.units == units
    for layer in grouping.frozen:
        assert layer.reason.startswith('an output')
        assert layer.layer.rpartition('.')[2] in {
            'rpn_cls', 'rpn_reg', 'fc_cls', 'fc_reg', 'conv_logits',
        }  # fmt: skip
    iterate(pruner, calls.loss)
    assert_all_seen(pruner)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, groups, units, outputs', [(FASTER, 42, 14_272, 4), (MASK, 47, 15_552, 5)]
)
def test_round_trip(name, groups, units, outputs, tmp_path):
    """30 % go; masked equals compact; it trains; a config rebuilds it."""
    config = full(name)
    config.model.backbone.init_cfg = None
    found = traced(config, 64)
    assert (len(found.grouping.groups), found.grouping.units) == (groups, units)
    assert len(found.grouping.frozen) == outputs and found.macs > 0.99
    assert_prunes(found, tmp_path)


def test_rpn_and_rois_read_the_same_units(mask_rcnn):
    pruner = mask_rcnn[2]
    groups = pruner.units.grouping.groups
    [group] = [g for g in groups if g.name == 'neck.fpn_convs.0.conv']
    read = {m.name.removesuffix('.weight'): m.width for m in group.members}
    assert group.units == 8
    assert read['rpn_head.rpn_conv'] == read['roi_head.mask_head.convs.0.conv'] == 1
    assert read['roi_head.bbox_head.shared_fcs.0'] == 7 * 7
    for attribute in ('bbox_roi_extractor.out_channels', 'mask_head.in_channels'):
        assert read[f'roi_head.{attribute}'] == 1


@pytest.mark.slow
def test_grid_head_is_pruned_as_far_as_its_grouped_deconvolution_allows():
    torch.manual_seed(0)
    config = full(GRID)
    config.model.backbone.update(depth=18, base_channels=8)
    config.model.neck.in_channels = [8, 16, 32, 64]
    model = build_model(config)
    calls = BatchCalls(model, demo_batch(config))
    pruner = ready(model, calls)
    reasons = reasons_of(pruner.units.grouping)
    # each conv group of the last deconvolution makes one of the grid points
    assert reasons['roi_head.grid_head.convs.7.conv'].startswith('an output')
    assert not any('disagree' in r or 'rows' in r for r in reasons.values())
    assert 'roi_head.grid_head.convs.0.conv' not in reasons
    iterate(pruner, calls.loss)
    assert not warnings_of(pruner)


# -- statistics --------------------------------------------------------------


class RoIRows:
    """The image of each row by the latest RoIs, independently of the package."""

    def __init__(self, model):
        self.latest = None
        for name, module in model.named_modules():
            if name.endswith('roi_extractor'):
                module.register_forward_pre_hook(self._note)

    def _note(self, module, args):
        self.latest = args[1][:, 0].long()

    def __call__(self, layer, x):
        if not layer.startswith('roi_head'):
            return torch.arange(len(x))
        assert len(x) == len(self.latest)
        return self.latest


def assert_equals_masks(pruner, loss):
    pruner.criterion.tap.detach()
    rows = RoIRows(pruner.model)
    groups = pruner.units.grouping.groups
    expected = mask_fisher(pruner.model, loss, groups, 2, rows)
    for module in pruner.model.modules():
        if type(module).__name__ == 'SingleRoIExtractor':
            module._forward_pre_hooks.clear()
    pruner.criterion.tap.attach()
    assert_close(observed(pruner, loss), expected)
    return expected


def test_importance_equals_explicit_masks_of_each_image(mask_rcnn):
    _, calls, pruner = mask_rcnn
    expected = assert_equals_masks(pruner, steady(calls))
    group_of = torch.from_numpy(pruner.units.grouping.group_of)
    for g in range(len(pruner.units.grouping.groups)):
        assert expected[group_of == g].count_nonzero() > 0


@pytest.mark.slow
def test_pruned_units_equal_masks_at_zero_of_each_image():
    """Every third unit is pruned, of the pyramid and of what reads RoIs as well."""
    torch.manual_seed(0)
    model, calls = built(slim(FASTER))
    calls.data['inputs'] = calls.data['inputs'].double()
    whole, loss = copy.deepcopy(model.double()), steady(calls)
    pruner = ready(model, calls, loss, recover=True)
    groups, group_of = pruner.units.grouping.groups, pruner.units.group_of
    pruner.units.prune(np.arange(0, len(group_of), 3))
    kept = pruner.units.kept
    rows = RoIRows(whole)
    expected = mask_fisher(whole, loss, groups, 2, rows, kept=kept)
    assert_close(observed(pruner, loss), expected)
    for name in ('neck.fpn_convs.0.conv', 'roi_head.bbox_head.shared_fcs.0'):
        (number,) = [g for g, group in enumerate(groups) if group.name == name]
        assert (expected[torch.from_numpy((group_of == number) & ~kept)] > 0).any()


def summed(model, images, boxes, mask_boxes):
    """A loss that adds up over images: a sum over fixed RoIs, (R, 5) each.

    Args:
        model: A Mask R-CNN in eval mode.
        images: (N, 3, H, W).
        boxes: RoIs for the box head.
        mask_boxes: RoIs for the mask head.
    """
    features = model.extract_feat(images)
    box = model.roi_head._bbox_forward(features, boxes)
    mask = model.roi_head._mask_forward(features, mask_boxes)
    outputs = [*sum(map(list, model.rpn_head(features)), [])]
    outputs += [box['cls_score'], box['bbox_pred'], mask['mask_preds']]
    return sum(o.square().sum() for o in outputs)


def test_images_of_a_batch_count_as_they_do_alone(mask_rcnn):
    model, calls, pruner = mask_rcnn
    images = calls.data['inputs']
    rois = torch.tensor(
        [[1, 4, 4, 60, 50], [0, 0, 0, 20, 30], [1, 9, 9, 20, 20], [0, 30, 5, 90, 60]],
        dtype=torch.float64,
    )
    for mask_rois in (rois[1:3], rois[:1], rois[:0]):  # of both images, one, none
        alone = []
        for n in range(2):
            own, own_mask = (r[r[:, 0] == n] * torch.tensor([0.0, 1, 1, 1, 1])
                             for r in (rois, mask_rois))  # fmt: skip
            args = images[n : n + 1], own, own_mask
            model.eval()
            alone.append(observed(pruner, lambda m, args=args: summed(m, *args)))
        together = observed(pruner, lambda m, r=mask_rois: summed(m, images, rois, r))
        model.train()
        assert float(alone[0].min()) >= 0 and float(together.sum()) > 0
        assert_close(together, alone[0] + alone[1])


def test_image_without_boxes(mask_rcnn):
    _, calls, pruner = mask_rcnn
    assert_equals_masks(pruner, steady(without_boxes(calls, 0)))


def test_batch_without_boxes(mask_rcnn):
    _, calls, pruner = mask_rcnn
    importance = observed(pruner, steady(without_boxes(calls, 0, 1)))
    assert importance.isfinite().all() and not warnings_of(pruner)
    names = [g.name for g in pruner.units.grouping.groups]
    seen = dict(zip(names, seen_by(pruner), strict=True))
    assert seen['neck.fpn_convs.0.conv'] == 1
    assert seen['roi_head.mask_head.convs.0.conv'] == 0


@pytest.mark.parametrize('sides', [(9, 20), (9, 20, 300), (300, 300)])
def test_pyramid_levels_without_rois(mask_rcnn, sides):
    """RoIs of 300 pixels are pooled on level 2, small ones on level 0."""
    model, calls, pruner = mask_rcnn
    images = calls.data['inputs']
    rois = [[n % 2, 2, 3, 2 + side, 3 + side] for n, side in enumerate(sides)]
    rois = torch.tensor(rois, dtype=torch.float64)
    levels = model.roi_head.bbox_roi_extractor.map_roi_levels(rois, 4)
    assert set(levels.tolist()) == {2 if side == 300 else 0 for side in sides}
    model.eval()
    assert_equals_masks(pruner, lambda m: summed(m, images, rois, rois))
    assert_all_seen(pruner)
    model.train()


def test_first_batch_without_boxes_freezes_what_the_mask_head_reads(mask_rcnn):
    """It pools no RoI, so no graph ties it to the pyramid; verification finds out."""
    model, calls, pruner = mask_rcnn
    empty = without_boxes(calls, 0, 1)
    pruner.criterion.tap.detach()
    other = GroupFisherPruner(copy.deepcopy(model), interval=10**6)
    pruner.criterion.tap.attach()
    grouping = other.prepare(steady(empty), calls.forward, 2)
    names = [g.name for g in pruner.units.grouping.groups]
    fixed = [n for n in names if n not in [g.name for g in grouping.groups]]
    assert fixed == ['neck.fpn_convs.0.conv']
    [reason] = {f.reason for f in grouping.frozen if 'fpn_convs' in f.layer}
    assert reason.startswith('masked and compact disagree')


def test_compact_model_trains_on_batches_without_boxes(mask_rcnn):
    model, calls, pruner = mask_rcnn
    _, masked, small = cut_at_random(model, pruner)
    for fewer in (without_boxes(calls, 0), without_boxes(calls, 0, 1)):
        losses = [steady(fewer)(net) for net in (masked, small)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-9)
        losses[1].backward()
    gradients = [p.grad for p in small.parameters() if p.grad is not None]
    assert len(gradients) > 100 and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize('name', [CASCADE, DOUBLE])
def test_other_heads_see_each_unit_and_lose_no_row(name):
    torch.manual_seed(0)
    model, calls = built(slim(name))
    pruner = ready(model, calls, strict=True)
    importance = observed(pruner, calls.loss)
    assert_all_seen(pruner)
    assert float(importance.min()) >= 0
    used = pruner.criterion.tap.use
    assert not used.lost and {n for n in used.rois if 'head' not in n} == set()


# -- masked and compact ------------------------------------------------------


@pytest.mark.parametrize('name', [FASTER, MASK, CASCADE, DOUBLE])
def test_masked_equals_compact(name):
    torch.manual_seed(0)
    model, calls = built(slim(name))
    pruner = ready(model, calls)
    pruner.close()
    groups = pruner.units.grouping.groups
    kept = random_units(groups, 0.3, np.random.default_rng(0))
    assert disagreement(model, groups, kept, calls.forward) is None
    assert disagreement(model, groups, kept, calls.steady_loss) is None


def test_verification_does_not_hang_on_the_order_of_proposals():
    """In a flat image all scores of a RPN tie, so that rounding decides."""
    torch.manual_seed(0)
    model, calls = built(slim(FASTER))
    pruner = ready(model, calls)
    pruner.close()
    grouping = pruner.units.grouping
    calls.data['inputs'] = torch.zeros_like(calls.data['inputs'])
    for seed in range(3):
        assert not find_disagreements(model, grouping, calls.forward, seed)


def test_a_training_step_is_the_same_step(mask_rcnn):
    model, calls, pruner = mask_rcnn
    losses = []
    for net in cut_at_random(model, pruner)[1:]:
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        losses.append([])
        for _ in range(3):
            loss = steady(calls)(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][0] != losses[0][1]


# -- structure ---------------------------------------------------------------


@pytest.fixture
def pruned(mask_rcnn):
    """A structure of the slim Mask R-CNN with 30 % of the units gone."""
    model, _, pruner = mask_rcnn
    kept, *_ = cut_at_random(model, pruner)
    return PruneStructure.of(pruner.units.grouping.groups, kept, shapes_of(model))


def test_attributes_are_true(mask_rcnn, pruned):
    assert pruned.attributes == {
        'neck.out_channels': 6,
        'rpn_head.in_channels': 6,
        'roi_head.bbox_roi_extractor.out_channels': 6,
        'roi_head.mask_roi_extractor.out_channels': 6,
        'roi_head.bbox_head.in_channels': 6,
        'roi_head.mask_head.in_channels': 6,
    }


def test_reload_by_config(mask_rcnn, pruned, tmp_path):
    model, calls, pruner = mask_rcnn
    path = tmp_path / 'structure.json'
    pruned.save(path)
    assert PruneStructure.load(path) == pruned
    rebuilt = pruned_model(slim(MASK).model, path, backbone=dict(init_cfg=None))
    rebuilt.double()
    assert type(rebuilt) is type(model)
    _, masked, small = cut_at_random(model.eval(), pruner)
    rebuilt.load_state_dict(small.state_dict(), strict=True)
    with torch.no_grad():
        outputs = [calls.forward(m.eval()) for m in (masked, rebuilt)]
    model.train()
    assert difference(*outputs) < 1e-9
    assert rebuilt.roi_head.bbox_roi_extractor.out_channels == 6


@pytest.mark.parametrize(
    'name, width, words',
    [
        ('neck.out_channels', 9, 'neck.out_channels must be a number of at least 9'),
        ('neck.no_such', 4, r'neck.no_such must be a number of at least 4 \(got None'),
        ('nothing.out_channels', 4, 'nothing.out_channels must be a number'),
        ('neck.out_channels', 0, 'neck.out_channels must be a number of channels'),
        ('neck.out_channels', '6', r"must be a number of channels \(got '6'"),
        ('neck.out_channels', True, r'must be a number of channels \(got True'),
    ],
)
def test_wrong_attributes_are_refused(mask_rcnn, pruned, name, width, words):
    raw = json.loads(json.dumps(pruned.to_dict()))
    raw['attributes'] = {name: width}
    with pytest.raises(StructureError, match=words):
        check_fits(PruneStructure.from_dict(raw), mask_rcnn[0])


def test_structures_without_attributes_are_read(pruned):
    raw = pruned.to_dict()
    del raw['attributes']
    assert PruneStructure.from_dict(raw).attributes == {}


# -- proposals and costs -----------------------------------------------------


def test_fixed_proposals_lie_inside_and_leave_no_trace(mask_rcnn):
    model, calls, _ = mask_rcnn
    features = model.extract_feat(calls.data['inputs'])
    with fixed_proposals(model, 5) as outputs:
        first = model.rpn_head.predict(features, calls.data['data_samples'])
        again = model.rpn_head.predict(features, calls.data['data_samples'])
    assert len(outputs) == 2 and 'predict_by_feat' not in vars(model.rpn_head)
    for a, b in zip(first, again, strict=True):
        assert isinstance(a, InstanceData) and a.bboxes.shape == (5, 4)
        assert torch.equal(a.bboxes, b.bboxes)
        x1, y1, x2, y2 = a.bboxes.unbind(1)
        assert (x1 >= 0).all() and (x2 <= 96).all() and (x1 < x2).all()
        assert (y1 >= 0).all() and (y2 <= 64).all() and (y1 < y2).all()
    assert not torch.equal(first[0].bboxes, first[1].bboxes)


def test_models_without_rois_are_left_alone():
    with fixed_proposals(nn.Conv2d(1, 1, 1)) as outputs:
        pass
    assert outputs == [] and rois_per_image(nn.Conv2d(1, 1, 1)) == {}


def test_rois_are_counted_as_sampled_and_as_detected(mask_rcnn):
    model, calls, _ = mask_rcnn
    assert rois_per_image(model) == {
        'roi_head.bbox_roi_extractor': 16,
        'roi_head.bbox_head': 16,
        'roi_head.mask_roi_extractor': 100,
        'roi_head.mask_head': 100,
    }
    profiles = calls.profile(model, (3, 64, 64))
    assert profiles['roi_head.bbox_head.fc_cls.weight'].macs_positions == 16
    conv = profiles['roi_head.mask_head.convs.0.conv.weight']
    assert conv.macs_positions == conv.out_positions == 100 * 14 * 14
    upsample = profiles['roi_head.mask_head.upsample.weight']
    assert upsample.macs_positions == 100 * 14 * 14  # positions of its input
    assert upsample.out_positions == 100 * 28 * 28
    # The RPN's convolution runs on strides 4 to 64 of 64 pixels.
    positions = profiles['rpn_head.rpn_conv.weight'].macs_positions
    assert positions == sum(side * side for side in (16, 8, 4, 2, 1))


@pytest.mark.slow
def test_costs_are_those_of_the_paper():
    """199.3 G MACs, 41.75 M parameters, 294.6 M elements at 1280 x 800 (table 5)."""
    model, calls = built(full(FASTER))
    profiles = calls.profile(model, (3, 800, 1280))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    totals = CostTable(shapes, profiles, ()).totals(np.zeros(0))
    assert totals['macs'] == pytest.approx(199.3e9, rel=2e-3)
    assert totals['params'] == pytest.approx(41.75e6, rel=2e-3)
    assert totals['memory'] == pytest.approx(294.6e6, rel=2e-3)
    heads = {n: w for n, w in profiles.items() if n.startswith('roi_head')}
    rois = CostTable(shapes, heads, ()).totals(np.zeros(0))
    assert rois['macs'] / 512 == pytest.approx(14.3e6, rel=2e-3)
    assert rois['memory'] / 512 == pytest.approx(2.45e3, rel=2e-3)
    assert totals['macs'] - rois['macs'] == pytest.approx(192.03e9, rel=2e-4)
    assert totals['memory'] - rois['memory'] == pytest.approx(293.44e6, rel=2e-4)


# -- a whole run -------------------------------------------------------------


@pytest.mark.slow
def test_runner_prunes_and_the_artefact_loads(tmp_path):
    config = small_prune_config(tmp_path, target=dict(flops=0.2))
    config.model = slim(FASTER).model
    config.model.roi_head.bbox_head.num_classes = 10
    config.model.backbone.init_cfg = None
    runner = Runner.from_cfg(copy.deepcopy(config))
    runner.train()
    path = next((tmp_path / 'work').glob('*_flops20.pth'))
    model = pruned_model(config.model, path)
    load_checkpoint(model, str(path), strict=True)
    calls = BatchCalls(model, demo_batch(config, 2, (64, 64)))
    assert torch.isfinite(calls.loss(model.train()))
    width = len(model.neck.fpn_convs[0].conv.weight)
    assert width == model.roi_head.bbox_roi_extractor.out_channels < 8
