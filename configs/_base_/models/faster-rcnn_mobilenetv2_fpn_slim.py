# Faster R-CNN on MobileNetV2 with a slim FPN and heads, made for two CPU cores.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py']

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
    neck=dict(in_channels=[32, 96, 1280], out_channels=width, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[3], strides=[8, 16, 32, 64]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=width, featmap_strides=[8, 16, 32], finest_scale=28
        ),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=3),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
