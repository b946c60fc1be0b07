"""Heads and options that no end-to-end graph repeats are refused by name."""

import pytest
from mmcv.ops import ModulatedDeformConv2dPack
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from support.configs import CASCADE, DOUBLE, GRID, classifier, slim
from support.exporting import detector_config
from torch import nn

from mmgfp.engine.model_building import build_model
from mmgfp.export.graphs import end_to_end_graph, raw_graph
from mmgfp.utils.errors import ConfigError

WAY_OUT = r'export raw outputs instead \(leave --nms out\)'


def paa():
    config = get_config('mmdet::paa/paa_r50_fpn_1x_coco.py')
    config.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    config.model.neck.in_channels = [8, 16, 32, 64]
    return config


def detr():
    config = get_config('mmdet::detr/detr_r50_8xb2-150e_coco.py')
    config.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    config.model.neck.in_channels = [64]
    return config


@pytest.mark.parametrize(
    ('config', 'words'),
    [
        (paa, r'bbox_head must be .*\(got PAAHead\)'),
        (
            detr,
            r'a one-stage detector, or a two-stage one with RPN \(got DETR\)',
        ),
        (lambda: slim(CASCADE), r'roi_head must be .*\(got CascadeRoIHead\)'),
        (lambda: slim(DOUBLE), r'roi_head must be .*\(got DoubleHeadRoIHead\)'),
        (lambda: slim(GRID), r'roi_head must be .*\(got GridRoIHead\)'),
    ],
)
def test_heads(config, words):
    model = build_model(config())
    with pytest.raises(ConfigError, match=f'{words}; {WAY_OUT}'):
        end_to_end_graph(model)


def test_detector_is_refused_before_its_head():
    model = build_model(detector_config('retinanet'))
    with pytest.raises(ConfigError, match=r'model must be .*\(got Linear\)'):
        end_to_end_graph(nn.Linear(2, 2))
    model.bbox_head.bbox_coder = nn.Identity()
    with pytest.raises(ConfigError, match=r'bbox_coder must be .*\(got Identity\)'):
        end_to_end_graph(model)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(nms=dict(type='soft_nms', iou_threshold=0.5)), 'nms must be plain NMS'),
        (dict(nms=dict(type='nms', iou_threshold=0.5, max_num=9)), 'nms must be plain'),
        (dict(nms=None), 'nms must be plain NMS'),
        (dict(nms_pre=-1), r'nms_pre must be a positive integer \(got -1\)'),
        (dict(max_per_img=0), r'max_per_img must be a positive integer \(got 0\)'),
    ],
)
def test_test_cfg(changes, words):
    model = build_model(detector_config('retinanet'))
    model.bbox_head.test_cfg = ConfigDict({**model.bbox_head.test_cfg, **changes})
    with pytest.raises(ConfigError, match=f'bbox_head.test_cfg.{words}'):
        end_to_end_graph(model)


def test_pooling_of_rois():
    config = detector_config('faster')
    config.model.roi_head.bbox_roi_extractor.roi_layer = dict(
        type='RoIPool', output_size=7
    )
    with pytest.raises(ConfigError, match=r'roi_layer must be RoIAlign of averages'):
        end_to_end_graph(build_model(config))


@pytest.mark.parametrize('graph', [end_to_end_graph, raw_graph])
def test_layers_that_no_runtime_has(graph):
    model = build_model(detector_config('retinanet'))
    model.neck.extra = ModulatedDeformConv2dPack(4, 4, 3)
    words = r'model must be .*\(got ModulatedDeformConv2dPack of mmcv at neck.extra\)'
    with pytest.raises(ConfigError, match=words):
        graph(model)


def test_classifier_without_softmax():
    config = classifier(dict(type='ResNet', depth=18, base_channels=8), 64)
    config.model.head.update(type='MultiLabelLinearClsHead')
    config.model.head.loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    words = r'head must be one that predicts by softmax \(got MultiLabelLinearClsHead\)'
    with pytest.raises(ConfigError, match=words):
        end_to_end_graph(build_model(config))
