# RetinaNet on MobileNetV2 with a slim FPN and head, made for two CPU cores.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']

# ImageNet weights under the key prefix 'backbone.', for RGB inputs in [-1, 1].
pretrained = 'data/weights/mobilenet_v2_imagenet_from_tflite_mmdet_backbone.pth'
width = 80

model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], bgr_to_rgb=True
    ),
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(2, 4, 7),
        init_cfg=dict(type='Pretrained', prefix='backbone.', checkpoint=pretrained),
    ),
    neck=dict(
        in_channels=[32, 96, 1280],
        out_channels=width,
        start_level=0,
        add_extra_convs='on_output',
        num_outs=4,
    ),
    bbox_head=dict(
        num_classes=3,
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32, 64]),
    ),
)
