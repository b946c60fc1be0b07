"""Convolutions whose weights are standardised over their input channels."""

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from support.toys import Net, conv, grouped, images, square_loss, widths

from mmgfp.apps.analysis import coverage
from mmgfp.discovery.profile import profile_layers
from mmgfp.discovery.verify import disagreement


def build(kind):
    torch.manual_seed(0)
    parts = dict(stem=conv(3, 6), ws=kind(6, 5, 3, padding=1), head=conv(5, 4))
    return Net(lambda n, x: n.head(n.ws(n.stem(x).relu()).relu()), **parts)


@pytest.mark.parametrize('kind', [ConvWS2d, ConvAWS2d])
def test_outputs_may_go_and_inputs_may_not(kind):
    """A zeroed column counts in mean and deviation: it is no mask on the input."""
    model = build(kind)
    grouping = grouped(model)
    (group,) = grouping.groups
    names = ['weight', 'bias', 'weight_gamma', 'weight_beta']
    own = [n for n in names if hasattr(model.ws, n)]
    assert widths(group) == {(f'ws.{n}', 0): 1 for n in own} | {('head.weight', 1): 1}
    stem, head = grouping.frozen
    assert stem.layer == 'stem' and stem.channels == 6 and head.layer == 'head'
    assert 'read with a weight that is normalised over its input' in stem.reason
    kept = np.array([True, False, True, True, False])
    assert disagreement(model, [group], kept, lambda m: m(images())) is None
    profiles = profile_layers(model, lambda m: square_loss(m(images())), 2)
    shares = coverage(
        model, grouping, profiles
    )  # all but the stem's 6 · 27 of 612 weights
    assert shares['macs'] == pytest.approx(1 - 162 / (162 + 270 + 180))
    assert shares['channels'] == 5 / 15
    with torch.no_grad():
        plain = model(images())
        model.ws.weight[:, 0] = 0
        model.stem.weight[0], model.stem.bias[0] = 0, 0
        assert not torch.allclose(model(images()), plain)
