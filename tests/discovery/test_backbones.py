"""Backbones of MMPretrain: what is coupled in each, and that it can shrink."""

import pytest
from support.configs import classifier
from support.roundtrip import assert_prunes, traced

SWIN = dict(
    type='SwinTransformer',
    arch='tiny',
    img_size=64,
    stage_cfgs=dict(block_cfgs=dict(window_size=2)),
)
DCN = dict(
    type='mmdet.ResNet',
    depth=50,
    base_channels=16,
    out_indices=(3,),
    dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
    stage_with_dcn=(False, True, True, True),
)
SHUFFLE = dict(type='ShuffleNetV2', widen_factor=0.5)
RES2NET = dict(type='Res2Net', depth=50, scales=4, base_width=26)
#: Backbone, channels of its last stage, groups and units, least share of MACs.
CASES = {
    'resnet18': (dict(type='ResNet', depth=18), 512, 12, 2880, 1),
    'resnet50': (dict(type='ResNet', depth=50), 2048, 37, 11_456, 1),
    'resnet101': (dict(type='ResNet', depth=101), 2048, 71, 20_160, 1),
    'dcn_resnet': (DCN, 512, 37, 2864, 1),
    'resnext': (dict(type='ResNeXt', depth=50), 2048, 21, 4416, 1),
    'mobilenet_v2': (dict(type='MobileNetV2', widen_factor=0.5), 1280, 25, 5256, 1),
    'mobilenet_v3': (dict(type='MobileNetV3', arch='small'), 576, 26, 3848, 1),
    'regnet': (dict(type='RegNet', arch='regnetx_400mf'), 384, 27, 1040, 1),
    'regnetx_1.6gf': (dict(type='RegNet', arch='regnetx_1.6gf'), 912, 23, 1872, 1),
    'shufflenet_v1': (dict(type='ShuffleNetV1'), 960, 1, 8, 0.97),
    'shufflenet_v2': (SHUFFLE, 1024, 20, 1927, 0.99),
    'res2net': (RES2NET, 2048, 47, 7816, 1),
    'resnest': (dict(type='ResNeSt', depth=50), 2048, 55, 11_520, 1),
    'hrnet': (dict(type='HRNet', arch='w18'), 144, 135, 6980, 1),
    'densenet': (dict(type='DenseNet', arch='121'), 1024, 120, 10_240, 1),
    'efficientnet': (dict(type='EfficientNet', arch='b0'), 1280, 40, 11_404, 1),
    'se_resnet': (dict(type='SEResNet', depth=50), 2048, 53, 12_400, 1),
    'csp_resnet': (dict(type='CSPResNet', depth=50), 1024, 42, 12_480, 1),
    'convnext': (dict(type='ConvNeXt', arch='atto'), 320, 12, 7360, 0.8),
    'swin': (SWIN, 768, 12, 17_664, 0.5),
}
LARGE = (
    'resnet50', 'resnet101', 'hrnet', 'se_resnet', 'csp_resnet', 'swin', 'resnest',
    'densenet',
)  # fmt: skip
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in CASES]


@pytest.mark.parametrize('name', NAMES)
def test_backbone(name, tmp_path):
    backbone, channels, groups, units, share = CASES[name]
    found = traced(classifier(backbone, channels), 64)
    assert (len(found.grouping.groups), found.grouping.units) == (groups, units)
    assert found.macs >= share - 1e-9
    assert found.reason('head.fc').startswith('an output')
    assert_prunes(found, tmp_path)


def test_conv_groups_are_units_of_resnext():
    found = traced(classifier(*CASES['resnext'][:2]), 64)
    assert found.units('backbone.layer1.0.conv2') == 32
    (group,) = [g for g in found.grouping.groups if g.name == 'backbone.layer1.0.conv1']
    assert {m.name: m.width for m in group.members if m.role == 'out'} == {
        'backbone.layer1.0.conv1.weight': 4,
        'backbone.layer1.0.conv2.weight': 4,
    }


def test_depthwise_convs_join_expansion_and_projection():
    found = traced(classifier(*CASES['mobilenet_v2'][:2]), 64)
    expand, depthwise = (f'backbone.layer2.0.conv.{i}.conv' for i in (0, 1))
    assert found.units(expand) == found.units(depthwise) == 48


def test_split_attention_narrows_both_halves():
    """Their sum joins the two conv groups, which can only lose the same channels."""
    found = traced(classifier(*CASES['resnest'][:2]), 64)
    assert found.units('backbone.layer1.0.conv2.conv') == 64


def test_res2net_parts_stay_equally_wide():
    found = traced(classifier(*CASES['res2net'][:2]), 64)
    assert found.units('backbone.layer1.0.conv1') == 26


def test_shuffle_v1_ties_all_channels_of_a_block():
    """Its 3 conv groups of 20 channels each read 6 or 7 channels of all 3 before.

    A unit would have to take the same places of each conv group on both sides of the
    shuffle; with widths that 9 does not divide only all channels together do.
    """
    found = traced(classifier(*CASES['shufflenet_v1'][:2]), 64)
    assert found.reason('backbone.layers.0.0.g_conv_1x1_compress.conv') == (
        'all its channels are one unit'
    )
    (group,) = found.grouping.groups
    assert group.name == 'backbone.conv1.conv'


def test_deformable_convs_shrink_and_their_offsets_do_not():
    found = traced(classifier(*CASES['dcn_resnet'][:2]), 64)
    offsets = [f for f in found.grouping.frozen if f.layer != 'head.fc']
    assert [f.layer.rpartition('.')[2] for f in offsets] == ['conv_offset'] * 13
    reason = 'read as offsets by ModulatedDeformConv2dFunction'
    assert {f.reason for f in offsets} == {reason}
    assert found.units('backbone.layer2.0.conv2') == 32


def test_layer_norm_leaves_only_hidden_neurons():
    found = traced(classifier(*CASES['convnext'][:2]), 64)
    assert 'NativeLayerNorm' in found.reason('backbone.stages.0.0.depthwise_conv')
    assert found.units('backbone.stages.0.0.pointwise_conv1') == 160
