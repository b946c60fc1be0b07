"""Losses on recorded proposals: two models see the same RoIs."""

import copy

import numpy as np
import pytest
import torch
from support.configs import CASCADE, FASTER, MASK
from support.two_stage import rois_of, small_two_stage
from torch import nn

from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.options import CompensationConfig
from mmgfp.discovery.discover import discover
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.recorded_losses import RecordedLoss, recorded_losses
from mmgfp.surgery.structure import PruneStructure, shapes_of

PLAIN = dict(method='least_squares', ridges=(1e-13,), norms='none')


def seen_by(model, names, losses):
    """Inputs (P, n) and outputs (P, o) of layers over all batches, in eval mode."""
    calls = {name: ([], []) for name in names}

    def hook(name):
        def note(module, args, y):
            calls[name][0].append(args[0].detach().clone())
            calls[name][1].append(y.detach().clone())

        return note

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    model.eval()
    for loss in losses:
        loss(model)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(x), torch.cat(y)) for name, (x, y) in calls.items()}


def cut(model, batch, share=0.3):
    """Groups of a model, and which units stay when a share goes at random."""
    calls = BatchCalls(model, batch)
    found = discover(model, calls.loss, calls.forward, calls.images)
    rng = np.random.default_rng(0)
    return found.grouping, rng.random(found.grouping.units) >= share


@pytest.mark.parametrize(
    'name',
    [FASTER, *(pytest.param(n, marks=pytest.mark.slow) for n in (MASK, CASCADE))],
)
def test_two_models_see_the_same_rois(name):
    """Whatever the second one would propose, and stages would hand on."""
    model, batches = small_two_stage(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3).add_(0.01)
    model.eval(), other.eval()
    loss = RecordedLoss(model, batches[0])
    first, second = (rois_of(m, loss) for m in (model, other))
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = rois_of(other, RecordedLoss(other, batches[0]))
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(first, alone, strict=True)
    )
    # Always the same batch, and both models are as they were.
    torch.manual_seed(5)
    assert torch.equal(loss(model), loss(model))
    assert not torch.equal(loss(model), loss(other))
    assert 'predict_by_feat' not in vars(model.rpn_head)


def test_refitted_fully_connected_layers_are_plain_least_squares():
    """On the rows of all RoIs of all batches."""
    model, batches = small_two_stage(FASTER)
    for layer in model.roi_head.bbox_head.shared_fcs:
        nn.init.ones_(layer.bias)  # units that are never zero, for one solution
    grouping, kept = cut(model, batches[0])
    losses = recorded_losses(model, batches)
    result = compensate(model, grouping, kept, losses, CompensationConfig(**PLAIN))
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(model))
    refitted = {r.layer.removesuffix('.weight') for r in result.refitted}
    names = ['roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg']
    names.append('roi_head.bbox_head.shared_fcs.1')
    assert refitted >= set(names)
    before, after = (seen_by(m, names, losses) for m in (model, result.model))
    for name in names:
        x, y = after[name][0], before[name][1]
        assert len(x) == len(y) > x.shape[1]
        y = y[:, structure.kept[f'{name}.weight'].get(0, slice(None))].double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
        assert torch.linalg.matrix_rank(x) == x.shape[1]
        expected = torch.linalg.lstsq(x, y).solution
        layer = result.model.get_submodule(name)
        weights = torch.cat([layer.weight.T, layer.bias[None]]).detach().double()
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)
