"""One-stage detectors of MMDetection: what stays of each, and that it can shrink."""

import pytest
from mmengine.hub import get_config
from support.roundtrip import assert_prunes, traced

OUTPUT = 'an output: reaches the loss without a further layer'

#: SSD300 divides each channel of its VGG's conv4_3 by a norm over all of them, which a
#: mask on the inputs of later layers leaves as it was. Two predictors with 6.6 % of the
#: MACs read nothing else.
L2_NORM = 'channels are reduced, before any mask on them, by Sum'
#: Config, size of the images, layers that are frozen as outputs, least share of MACs.
CASES = {
    'atss': ('atss/atss_r50_fpn_1x_coco.py', 128, 3, 0.99),
    'fsaf': ('fsaf/fsaf_r50_fpn_1x_coco.py', 128, 2, 0.99),
    'paa': ('paa/paa_r50_fpn_1x_coco.py', 128, 3, 0.99),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 128, 3, 0.99),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco.py', 128, 2, 0.99),
    'yolox': ('yolox/yolox_tiny_8xb8-300e_coco.py', 128, 9, 0.99),
    'yolov3': ('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py', 128, 4, 0.99),
    'yolov3_darknet': ('yolo/yolov3_d53_8xb8-320-273e_coco.py', 128, 3, 0.99),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 128, 6, 0.99),
    'ssdlite': ('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', 320, 12, 0.95),
    'ssd': ('ssd/ssd300_coco.py', 300, 13, 0.93),
}
FAST = ('fcos', 'yolov3', 'rtmdet')
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in CASES]


def config(path):
    """A library's config with its backbone cut to ResNet-18 where it is a ResNet."""
    cfg = get_config(f'mmdet::{path}')
    for node in (cfg.model, cfg.model.backbone):
        node.pop('init_cfg', None)
    if cfg.model.backbone.type == 'ResNet':
        cfg.model.backbone.update(depth=18, frozen_stages=-1)
        cfg.model.neck.in_channels = [64, 128, 256, 512]
    return cfg


@pytest.mark.parametrize('name', NAMES)
def test_detector(name, tmp_path):
    path, size, outputs, share = CASES[name]
    found = traced(config(path), size)
    reasons = [f.reason for f in found.grouping.frozen]
    # A centerness has one channel; MobileNetV2's last conv is not asked for.
    assert set(reasons) <= {
        OUTPUT,
        'its output channels carry no labels',
        'no further layer reads its output',
        L2_NORM,
    }
    assert len(reasons) == outputs
    assert found.macs >= share
    assert_prunes(found, tmp_path)


@pytest.mark.slow
def test_only_the_norm_keeps_channels_of_ssd300():
    found = traced(config(CASES['ssd'][0]), 300)
    kept = {f.layer: f.channels for f in found.grouping.frozen if f.reason == L2_NORM}
    assert kept == {'backbone.features.21': 512}
    assert found.reason('bbox_head.cls_convs.0.0') == OUTPUT
    assert (found.grouping.inputs['bbox_head.cls_convs.0.0.weight'] == -1).all()
    assert (found.grouping.inputs['bbox_head.cls_convs.1.0.weight'] >= 0).all()
    assert found.macs == pytest.approx(0.9342, abs=5e-4)


def test_norm_groups_of_heads_are_units():
    """FCOS normalises its 256 head channels in 32 groups, which go as a whole."""
    found = traced(config(CASES['fcos'][0]), 128)
    assert found.units('bbox_head.cls_convs.0.conv') == 32
