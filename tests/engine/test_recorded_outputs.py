"""Raw outputs on recorded proposals, without labels."""

import copy

import pytest
import torch
from support.configs import CASCADE, FASTER, MASK, slim_retinanet
from support.two_stage import rois_of, small_two_stage

from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.recorded_outputs import RecordedOutputs
from mmgfp.output_losses import output_losses
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.tree import tree_tensors

CASCADE_BOXES = 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'


def without_boxes(batch):
    """The same images, on which nothing is annotated."""
    batch = copy.deepcopy(batch)
    for sample in batch['data_samples']:
        for field in list(sample.keys()):
            delattr(sample, field)
    return batch


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3).add_(0.01)
    return other


@pytest.mark.parametrize('name', [FASTER, CASCADE_BOXES, MASK])
def test_two_models_give_outputs_of_the_same_rois(name):
    model, batches = small_two_stage(name)
    model.test_cfg.rpn.max_per_img = 70
    other, batch = moved(model), without_boxes(batches[0])
    outputs = RecordedOutputs(model, batch)
    first, second = (rois_of(m, outputs) for m in (model, other))
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Each image has its share, of the masks, too.
    images = [rois[:, 0].long().bincount().tolist() for rois in first]
    assert all(count == [50, 50] for count in images) or name != MASK
    assert all(len(count) == 2 for count in images)
    # The outputs are those of the RPN and of the heads.
    ((*heads,), proposals), again = outputs(model), outputs(model)
    model.eval()
    features = model.extract_feat(model.data_preprocessor(batch)['inputs'])
    expected = [*tree_tensors(model.rpn_head(features))]
    got = [t for t in tree_tensors(proposals) if t.dim() == 4]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert any(t.requires_grad for t in tree_tensors(heads))
    both = zip(tree_tensors(again), tree_tensors((heads, proposals)), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    assert 'predict_by_feat' not in vars(model.rpn_head)
    (loss,) = output_losses(model, [outputs])
    assert torch.equal(loss(model), loss(model))
    assert not torch.equal(loss(model), loss(other))


def test_outputs_of_one_stage_need_no_boxes():
    from mmengine.hub import get_config

    model, calls = slim_retinanet()
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    batch = demo_batch(cfg, 2, (64, 64))
    outputs, proposals = RecordedOutputs(model, without_boxes(batch))(model)
    for one, two in zip(
        *map(tree_tensors, (outputs, calls.forward(model))), strict=True
    ):
        assert one.shape == two.shape and one.requires_grad
    assert proposals == []


def test_what_gives_no_raw_outputs_is_refused():
    model, batches = small_two_stage(FASTER)
    model.roi_head.forward = lambda *args: 1 / 0
    words = r'FasterRCNN must be a model that gives raw outputs.*\(got ZeroDivision'
    with pytest.raises(ConfigError, match=words):
        RecordedOutputs(model, batches[0])
    # Masks of cascades are merged, without gradients.
    model, batches = small_two_stage(CASCADE)
    outputs = RecordedOutputs(model, batches[0])
    with pytest.raises(ConfigError, match='outputs must be tensors that gradients can'):
        output_losses(model, [outputs])
