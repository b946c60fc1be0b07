"""Distances of outputs, worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from mmgfp.engine.distillation.losses import (
    feature_distance,
    overlap_distance,
    sigmoid_divergence,
    softmax_divergence,
)
from mmgfp.engine.distillation.maps import compare_maps
from mmgfp.utils.errors import ConfigError


def logit(p):
    return math.log(p / (1 - p))


def bernoulli(p, q):
    """The divergence of a coin q from a coin p."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_softmax_divergence_at_a_temperature():
    """Logits of twice ln 3 at T = 2 are (3/4, 1/4); 4 · (3/4 ln 3/2 + 1/4 ln 1/2)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    value = softmax_divergence(student, teacher, 2.0)
    assert value.tolist() == pytest.approx([expected])
    assert softmax_divergence(teacher, teacher, 2.0).item() == 0


def test_sigmoid_divergence():
    student, teacher = (torch.tensor([logit(p)]) for p in (0.5, 0.9))
    value = sigmoid_divergence(student, teacher).item()
    assert value == pytest.approx(bernoulli(0.9, 0.5), rel=1e-5)
    assert sigmoid_divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_overlap_distance():
    """Boxes 2 x 2 and 3 x 2 that share 2 x 2 at the point; 1 - 4/6. Empty ones: 1."""
    ours, theirs = torch.tensor([1.0, 1, 1, 1]), torch.tensor([2.0, 1, 1, 1])
    assert overlap_distance(ours, theirs).item() == pytest.approx(1 / 3)
    assert overlap_distance(torch.zeros(4), theirs).item() == pytest.approx(1)
    assert overlap_distance(torch.zeros(4), -theirs).item() == 0


def test_feature_distance_is_one_minus_the_correlation():
    teacher = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for student, expected in ((3 * teacher + 7, 0.0), (-teacher, 2.0)):
        distance = feature_distance(student, teacher).item()
        assert distance == pytest.approx(expected, abs=1e-4)
    other = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    rows = [x.transpose(0, 1).reshape(3, -1) for x in (teacher, other)]
    pairs = zip(*rows, strict=True)
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]
    expected = 1 - torch.stack(correlations).mean().item()
    assert feature_distance(other, teacher).item() == pytest.approx(expected, abs=1e-4)


def head(priors=1, coder='DeltaXYWHBBoxCoder', sigmoid=True, **more):
    made = SimpleNamespace(
        prior_generator=SimpleNamespace(num_base_priors=[priors] * 2),
        use_sigmoid_cls=sigmoid,
        bbox_coder=type(coder, (), {})(),
        **more,
    )
    return made


def maps(*values):
    """Two levels of 1 x 1: (N = 1, channels) of each."""
    return [torch.tensor(v)[None, :, None, None] for v in values]


def test_maps_of_a_sigmoid_head():
    """Two levels, two classes: confidences 0.9 and 0.4; the divisor is 1.3."""
    theirs = [
        maps([logit(0.9), logit(0.2)], [logit(0.4), logit(0.1)]),
        maps([0.0, 0, 0, 0], [1.0, 1, 1, 1]),
    ]
    ours = [
        maps([logit(0.5), logit(0.2)], [logit(0.4), logit(0.3)]),
        maps([4.0, 0, 0, 0], [1.0, 1, 3, 1]),
    ]
    terms = compare_maps(head(), ours, theirs, 1.0, [])
    cls = (bernoulli(0.9, 0.5) + bernoulli(0.1, 0.3)) / 1.3
    assert terms['cls'].item() == pytest.approx(cls, rel=1e-4)
    bbox = (0.9 * 1 + 0.4 * 0.5) / 1.3
    assert terms['bbox'].item() == pytest.approx(bbox, rel=1e-4)


def test_priors_of_one_place_are_told_apart():
    """Channels are (prior, class): the second prior's box counts by its own score."""
    theirs = [maps([logit(0.9), logit(0.4)], [-50.0] * 2), maps([0.0] * 8, [0.0] * 8)]
    ours = [theirs[0], maps([0.0] * 4 + [1.0] * 4, [0.0] * 8)]
    terms = compare_maps(head(2), ours, theirs, 1.0, [])
    assert terms['cls'].item() == pytest.approx(0, abs=1e-6)
    assert terms['bbox'].item() == pytest.approx(0.4 / 1.3, rel=1e-4)


def test_background_of_a_softmax_head_is_no_confidence():
    """One class at 1/4 beside the background: the divisor is 1, not 1/2."""
    theirs = [maps([0.0, math.log(3)], [0.0, math.log(3)]), maps([0.0] * 4, [0.0] * 4)]
    ours = [maps([0.0, 0.0], [0.0, math.log(3)]), maps([2.0] * 4, [0.0] * 4)]
    terms = compare_maps(head(sigmoid=False), ours, theirs, 1.0, [])
    cls = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert terms['cls'].item() == pytest.approx(cls, rel=1e-4)
    assert terms['bbox'].item() == pytest.approx(0.25 * 2, rel=1e-4)


def test_distances_are_compared_by_overlap_and_weighed_by_centerness():
    """Confidence is 0.8 · 0.5 on one level and about none on the other."""
    theirs = [
        maps([logit(0.8)], [-50.0]),
        maps([2.0, 1, 1, 1], [0.0] * 4),
        maps([0.0], [0.0]),
    ]
    ours = [theirs[0], maps([1.0, 1, 1, 1], [0.0] * 4), maps([logit(0.9)], [0.0])]
    coder = head(coder='DistancePointBBoxCoder')
    terms = compare_maps(coder, ours, theirs, 1.0, [])
    assert terms['bbox'].item() == pytest.approx(0.4 / 3, rel=1e-4)
    assert terms['cls'].item() == pytest.approx(0.4 * bernoulli(0.5, 0.9), rel=1e-4)


def test_distributions_are_compared_side_by_side():
    """One of four sides is off, with T = 1: a quarter of its divergence."""
    theirs = [maps([50.0], [-50.0]), maps([math.log(3), 0.0] + [0.0] * 6, [0.0] * 8)]
    ours = [theirs[0], maps([0.0] * 8, [0.0] * 8)]
    terms = compare_maps(head(reg_max=1), ours, theirs, 1.0, [])
    side = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert terms['bbox'].item() == pytest.approx(side / 4, rel=1e-4)


def test_what_is_not_understood_is_left_out_with_the_reason():
    outputs = [
        maps([0.0], [0.0]),
        maps([0.0] * 5, [0.0] * 5),
        maps([0.0] * 2, [0.0] * 2),
    ]
    left_out = []
    assert compare_maps(head(), outputs, outputs, 1.0, left_out).keys() == {'cls'}
    assert len(left_out) == 2 and all('not compared' in reason for reason in left_out)


def test_other_shapes_are_refused():
    ours = [maps([0.0], [0.0]), maps([0.0] * 4, [0.0] * 4)]
    theirs = [maps([0.0] * 2, [0.0] * 2), ours[1]]
    with pytest.raises(ConfigError, match='maps of the teacher must be of the shapes'):
        compare_maps(head(), ours, theirs, 1.0, [])
