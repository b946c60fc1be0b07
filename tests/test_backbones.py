"""Backbones of MMPretrain: what is coupled in each, and that it can shrink."""

import pytest
from mmengine.config import Config
from roundtrip import assert_prunes, traced

CASES = {
    # name: (backbone, channels of its last stage, units in all, share of MACs)
    'resnet18': (dict(type='ResNet', depth=18), 512, 2880, 1),
    'resnext': (dict(type='ResNeXt', depth=50, groups=32, width_per_group=4), 2048, None, 1),
    'mobilenet_v2': (dict(type='MobileNetV2', widen_factor=0.5), 1280, None, 1),
    'mobilenet_v3': (dict(type='MobileNetV3', arch='small'), 576, None, 1),
    'regnet': (dict(type='RegNet', arch='regnetx_400mf'), 384, None, 1),
    'shufflenet_v2': (dict(type='ShuffleNetV2', widen_factor=0.5), 1024, None, 0.95),
    'res2net': (dict(type='Res2Net', depth=50, scales=4, base_width=26), 2048, None, 1),
    'resnest': (dict(type='ResNeSt', depth=50), 2048, None, 1),
    'hrnet': (dict(type='HRNet', arch='w18'), 144, None, 0.9),
    'densenet': (dict(type='DenseNet', arch='121'), 1024, None, 1),
    'efficientnet': (dict(type='EfficientNet', arch='b0'), 1280, None, 1),
    'se_resnet': (dict(type='SEResNet', depth=50), 2048, None, 1),
    'csp_resnet': (dict(type='CSPResNet', depth=50), 1024, None, 1),
    'convnext': (dict(type='ConvNeXt', arch='atto'), 320, None, 0.8),
    'swin': (
        dict(
            type='SwinTransformer',
            arch='tiny',
            img_size=64,
            stage_cfgs=dict(block_cfgs=dict(window_size=2)),
        ),
        768,
        None,
        0.5,
    ),
}
