"""Rows of inputs times the matrix of a layer are its outputs."""

import pytest
import torch
from torch import nn

from mmgfp.compensation.inputs import LinearSystem, unsupported

LAYERS = {
    'conv': (nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    'stride, padding': (nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2)), (2, 4, 7, 8)),
    'dilation': (nn.Conv2d(4, 6, 3, dilation=(1, 2), bias=False), (2, 4, 7, 8)),
    'same': (nn.Conv2d(4, 6, 4, padding='same'), (2, 4, 7, 8)),
    'reflect': (nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), (2, 4, 7, 8)),
    'circular': (nn.Conv1d(4, 6, 3, padding=1, padding_mode='circular'), (2, 4, 7)),
    'groups': (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 7, 8)),
    'depth-wise': (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (2, 4, 7, 8)),
    '3d': (nn.Conv3d(2, 3, 2, 2), (2, 2, 4, 5, 6)),
    'one image': (nn.Conv2d(4, 6, 3), (4, 7, 8)),
    'linear': (nn.Linear(5, 3), (2, 4, 5)),
    'one vector': (nn.Linear(5, 3), (5,)),
    'transposed': (nn.ConvTranspose2d(4, 6, (2, 3), (2, 3)), (2, 4, 5, 6)),
}


@pytest.mark.parametrize('name', LAYERS)
def test_rows_times_matrix(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    system = LinearSystem(layer)
    x = torch.randn(shape, dtype=torch.double)
    rows, y = torch.cat([*system.rows(x)], 1), layer(x)
    assert unsupported(layer) is None
    expected = system.targets(y)
    groups, count = getattr(layer, 'groups', 1), system.count(x)
    assert rows.shape == (groups, count, system.inputs)
    assert expected.shape == (groups, count, system.outputs)
    assert expected.numel() == y.numel()
    torch.testing.assert_close(rows @ system.matrix(), expected)
    some = torch.tensor([0, count - 1, 0])
    picked = torch.cat([*system.rows(x, some)], 1)
    assert torch.equal(picked, rows[:, some])
    # Writing what was read changes nothing, and other values are read again.
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    system.write(system.matrix())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    other = torch.randn_like(system.matrix())
    system.write(other)
    assert torch.equal(system.matrix(), other)


def test_a_free_bias_is_not_written():
    system = LinearSystem(layer := nn.Conv2d(4, 6, 3, bias=False), free_bias=True)
    assert system.inputs == 37 and system.matrix()[0, -1].abs().max() == 0
    system.write(torch.ones(1, 37, 6))
    assert (layer.weight == 1).all() and layer.bias is None
    assert LinearSystem(nn.Linear(2, 2), free_bias=True).free_bias is False


@pytest.mark.parametrize(
    ('layer', 'reason'),
    [
        (nn.ConvTranspose2d(4, 6, 3, 2), 'without overlap'),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), 'of one group'),
        (nn.Bilinear(2, 2, 2), 'kind Bilinear'),
    ],
)
def test_what_is_no_linear_system(layer, reason):
    assert reason in unsupported(layer)
