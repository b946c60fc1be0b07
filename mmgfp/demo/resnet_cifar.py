"""ResNets that He et al. trained on CIFAR-10, and weights published for them.

Needs MMPretrain, so nothing in mmgfp imports it; a config does by
``custom_imports = dict(imports=['mmgfp', 'mmgfp.demo.resnet_cifar'])``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmgfp.utils.errors import StructureError


@MODELS.register_module()
class SlimResNetCIFAR(ResNet_CIFAR):
    """ResNet of 6n + 2 layers in three stages (arXiv 1512.03385, section 4.2).

    Where a stage begins, the shortcut is a 1x1 convolution without a norm. It can
    express the paper's option A (every other pixel, zeros for the new channels) both in
    training and in testing, which it could not with a batch norm behind it.

    Args:
        depth: 20, 32, 44, 56 or 110.
        base_channels: Channels of the first stage.
        **kwargs: Further arguments of `ResNet_CIFAR`.

    Examples:
        >>> model = SlimResNetCIFAR(depth=20)
        >>> model(torch.zeros(1, 3, 32, 32))[0].shape
        torch.Size([1, 64, 8, 8])
    """

    arch_settings = {
        depth: (BasicBlock, ((depth - 2) // 6,) * 3) for depth in (20, 32, 44, 56, 110)
    }

    def __init__(self, depth: int, base_channels: int = 16, **kwargs: Any) -> None:
        super().__init__(
            depth,
            stem_channels=base_channels,
            base_channels=base_channels,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
            **kwargs,
        )
        # Index 1 is the norm behind the shortcut's convolution.
        for name in self.res_layers[1:]:
            getattr(self, name)[0].downsample[1] = nn.Identity()


def option_a(channels: int) -> Tensor:
    """Return the 1x1 kernel that copies channels into the middle of twice as many.

    Args:
        channels: Output channels O.

    Returns:
        The kernel, (O, O / 2, 1, 1); the first and last quarters of the outputs are 0.

    Examples:
        >>> option_a(4).flatten(1)
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.],
                [0., 0.]])
    """
    kernel = torch.zeros(channels, channels // 2, 1, 1)
    copied = torch.arange(channels // 2)
    kernel[channels // 4 + copied, copied] = 1
    return kernel


def convert_akamaster(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of github.com/akamaster/pytorch_resnet_cifar10 for MMPretrain.

    Args:
        state: Weights of one of its ResNets with shortcuts of option A.

    Returns:
        Weights of an `ImageClassifier` with a `SlimResNetCIFAR` and a
        `LinearClsHead`, which computes the same.

    Raises:
        StructureError: If these are weights of another model.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    expected = {'conv1.weight', 'layer3.0.conv1.weight', 'linear.weight'}
    shortcuts = [key for key in state if 'shortcut' in key]
    if not expected <= set(state) or shortcuts:
        raise StructureError(
            'weights',
            'those of an akamaster ResNet with shortcuts of option A',
            f'the keys {", ".join(shortcuts or list(state)[:3])}, ...',
            'give one of its pretrained_models',
        )
    renamed = {
        re.sub('^backbone[.]linear[.]', 'head.fc.', f'backbone.{key}'): value
        for key, value in state.items()
    }
    # Option A has no weights of its own, so its convolution's are written here.
    for stage in (2, 3):
        block = f'layer{stage}.0'
        channels = len(state[f'{block}.conv1.weight'])
        renamed[f'backbone.{block}.downsample.0.weight'] = option_a(channels)
    return renamed
