# RetinaNet on a quarter-width ResNet-18, slim enough to train from scratch in
# minutes on two CPU cores.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']

width = 48

model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[64.0, 64.0, 64.0], bgr_to_rgb=True
    ),
    backbone=dict(
        depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=width, num_outs=4),
    bbox_head=dict(
        num_classes=10,
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32, 64]),
    ),
)
