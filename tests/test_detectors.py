"""One-stage detectors of MMDetection: what stays of each, and that it can shrink."""

import pytest
from mmengine.hub import get_config
from roundtrip import assert_prunes, traced

OUTPUT = 'an output: reaches the loss without a further layer'

#: Config, size of the images, layers that are frozen as outputs, least share of MACs.
CASES = {
    'atss': ('atss/atss_r50_fpn_1x_coco.py', 128, 3, 0.99),
    'fsaf': ('fsaf/fsaf_r50_fpn_1x_coco.py', 128, 2, 0.99),
    'paa': ('paa/paa_r50_fpn_1x_coco.py', 128, 3, 0.99),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 128, 3, 0.99),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco.py', 128, 2, 0.99),
    'yolox': ('yolox/yolox_tiny_8xb8-300e_coco.py', 128, 9, 0.99),
    'yolov3': ('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py', 128, 4, 0.99),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 128, 6, 0.99),
    'ssd': ('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', 320, 12, 0.95),
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
    }
    assert len(reasons) == outputs
    assert found.macs >= share
    assert_prunes(found, tmp_path)


def test_norm_groups_of_heads_are_units():
    """FCOS normalises its 256 head channels in 32 groups, which go as a whole."""
    found = traced(config(CASES['fcos'][0]), 128)
    assert found.units('bbox_head.cls_convs.0.conv') == 32
