"""Models and batches that are made up for configs of the installed libraries."""

import copy
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.hub import get_config
from support.configs import classifier
from torch import nn

from mmgfp.apps.input_shape import default_input_shape
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch, demo_calls, image_channels
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import ConfigError

DISTILLED = 'mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py'


def test_boxes_labels_and_masks_are_those_that_the_config_asks_for():
    config = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    batch = demo_batch(config, images=3, size=(64, 96))
    assert [tuple(image.shape) for image in batch['inputs']] == [(3, 64, 96)] * 3
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes.tensor
        assert torch.equal(boxes[-1], torch.tensor([0.0, 0.0, 96.0, 64.0]))
        assert torch.equal(sample.gt_instances.labels, torch.arange(3))
        assert len(sample.gt_instances.masks) == 3
        assert 'proposals' not in sample


def test_a_detector_without_rpn_is_given_proposals():
    config = get_config('mmdet::fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py')
    for sample in demo_batch(config)['data_samples']:
        assert sample.proposals.bboxes.shape == (3, 4)


def test_anchors_of_a_fixed_size_decide_the_size():
    config = get_config('mmdet::ssd/ssd300_coco.py')
    assert demo_batch(config)['inputs'][0].shape == (3, 300, 300)


@pytest.mark.parametrize(
    ('name', 'data'),
    [
        (
            'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco',
            'un',
        ),
        ('qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base', 'videos'),
        ('reid/reid_r50_8xb32-6e_mot15train80_test-mot15val20', 'crops'),
    ],
)
def test_other_data_than_images_is_refused_by_name(name, data):
    words = f'data_preprocessor must be one for images .* {data}'
    with pytest.raises(ConfigError, match=words):
        demo_batch(get_config(f'mmdet::{name}.py'))


def test_norms_that_need_several_gpus_become_plain_ones():
    config = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    kinds = {'SyncBN': config.model.backbone, 'MMSyncBN': config.model.neck}
    for kind, part in kinds.items():
        part.norm_cfg = dict(type=kind, requires_grad=True)
    kept = copy.deepcopy(config.model)
    model = build_model(config)
    assert config.model == kept
    base = nn.modules.batchnorm._NormBase
    norms = [m for m in model.modules() if isinstance(m, base)]
    assert len(norms) == 20 + 8  # of ResNet-18 and of the FPN's convolutions
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


@pytest.mark.slow
def test_a_distilled_detector_is_built_without_its_teachers_weights(monkeypatch):
    # It names its teacher's config by a path from the root of the library's configs.
    monkeypatch.chdir(Path(mmdet.__file__).parent / '.mim')
    config = get_config(DISTILLED)
    assert config.model.teacher_ckpt
    model = build_model(config)
    assert model.training
    calls = BatchCalls(model, demo_batch(config))
    assert calls.loss(model).isfinite()
    assert calls.profile(model)


def grey(config):
    config.model.data_preprocessor.update(mean=[120.0], std=[60.0], bgr_to_rgb=False)
    config.model.backbone.in_channels = 1


def four(config):
    config.model.data_preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
    config.model.backbone.in_channels = 4


def grey_means_for_colours(config):
    config.model.data_preprocessor.update(mean=[120.0], std=[60.0])


@pytest.mark.parametrize(
    ('change', 'channels'), [(grey, 1), (four, 4), (grey_means_for_colours, 3)]
)
def test_images_have_the_channels_that_a_detector_reads(change, channels):
    config = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    change(config)
    assert_counts(config, channels)


@pytest.mark.parametrize('channels', [1, 4])
def test_images_have_the_channels_that_a_classifier_reads(channels):
    backbone = dict(type='ResNet', depth=18, in_channels=channels)
    config = classifier(backbone, 512)
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64))]
    steps += [dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
    config.train_dataloader = dict(dataset=dict(pipeline=steps))
    for key in ('mean', 'std'):
        config.data_preprocessor[key] = config.data_preprocessor[key][:1] * channels
    assert_counts(config, channels)


def assert_counts(config, channels):
    """The loss runs, and costs are counted for images of so many channels."""
    model = build_model(config)
    calls = demo_calls(config, model)
    assert calls.loss(model).isfinite()
    assert default_input_shape(config, image_channels(config, model))[0] == channels
    profiles = calls.profile(model, (channels, 64, 96))
    assert profiles['backbone.conv1.weight'].macs_positions == 32 * 48
    for shape in [(channels + 1, 64, 96), (channels, 0, 96), (channels, 64)]:
        with pytest.raises(ConfigError, match='input_shape must be '):
            calls.profile(model, shape)


@pytest.mark.parametrize(
    ('name', 'channels'),
    [
        ('yolox/yolox_tiny_8xb8-300e_coco', 3),  # its first layer stacks 4 pixels
        ('ssd/ssd300_coco', 3),
    ],
)
def test_channels_where_the_config_does_not_tell(name, channels):
    config = get_config(f'mmdet::{name}.py')
    assert image_channels(config, build_model(config)) == channels
