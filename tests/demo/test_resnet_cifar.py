"""The CIFAR ResNet against the network that its weights were trained in."""

import runpy
import sys

import pytest
import torch
from mmengine.config import Config
from support.tooling import ROOT
from torch import nn
from torch.nn import functional as F

from mmgfp.demo.resnet_cifar import convert_akamaster, option_a
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import StructureError

CONFIG = ROOT / 'configs/cifar10/resnet20_cifar10.py'


class Block(nn.Module):
    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride == 2:  # option A
            quarter = out.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return F.relu(out + x)


class Reference(nn.Module):
    """ResNet-20 of arXiv 1512.03385 with option A, and akamaster's names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        before = 16
        for stage, channels in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range(3):
                blocks.append(Block(before, channels, 2 if stage > 1 and i == 0 else 1))
                before = channels
            setattr(self, f'layer{stage}', nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    reference = Reference()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
    state = {f'module.{key}': v for key, v in reference.state_dict().items()}
    model = build_model(Config.fromfile(CONFIG))
    model.load_state_dict(convert_akamaster(state), strict=True)
    return reference, model


@pytest.mark.parametrize('training', [False, True])
def test_converted_weights_compute_the_same(pair, training):
    reference, model = (m.train(training) for m in pair)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, got = reference(images), model(images, mode='tensor')
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_option_a_puts_zeros_on_both_sides():
    x = torch.randn(2, 4, 6, 6)
    got = F.conv2d(x, option_a(8), stride=2)
    assert torch.equal(got[:, 2:6], x[:, :, ::2, ::2])
    assert not got[:, :2].any() and not got[:, 6:].any()


def test_other_weights_are_refused(pair):
    reference, _ = pair
    state = reference.state_dict()
    with pytest.raises(StructureError, match='the keys conv1.weight'):
        convert_akamaster({'conv1.weight': state['conv1.weight']})
    projected = {**state, 'layer2.0.shortcut.0.weight': torch.zeros(32, 16, 1, 1)}
    with pytest.raises(StructureError, match=r'the keys layer2.0.shortcut.0.weight'):
        convert_akamaster(projected)


def test_tool_writes_weights_that_the_config_loads(pair, tmp_path, monkeypatch):
    reference, model = pair
    source, out = tmp_path / 'resnet20.th', tmp_path / 'out.pth'
    torch.save({'state_dict': reference.state_dict(), 'best_prec1': 9.0}, source)
    monkeypatch.setattr(sys, 'argv', ['tool', str(source), str(out)])
    runpy.run_path(str(ROOT / 'tools/convert_resnet_cifar.py'), run_name='__main__')
    written = torch.load(out, weights_only=True)['state_dict']
    expected = model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
