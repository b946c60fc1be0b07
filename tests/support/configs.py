"""Configs of small models and short runs."""

import torch
from mmengine.config import Config
from mmengine.hub import get_config

from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from support.tooling import ROOT

PRUNE_CONFIG = ROOT / 'configs/demo/retinanet_r18_fpn_digits_prune.py'

FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

MASK = 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

CASCADE = 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'

DOUBLE = 'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'

GRID = 'grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py'


def small_prune_config(folder, **hook):
    """The demo's pruning config on few images, with random weights."""
    config = Config.fromfile(PRUNE_CONFIG)
    spec = dict(num_train=16, num_val=4, size=64)
    root = str(folder / 'digits') + '/'
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if loader is not None:
            loader.batch_size = 2
            loader.dataset.data_root = root
            loader.dataset.spec = spec
    config.model.backbone.base_channels = 8
    config.model.neck.in_channels = [8, 16, 32, 64]
    config.load_from = None
    config.work_dir = str(folder / 'work')
    # MMEngine hands out visualizers by name, those of earlier runs as well.
    config.visualizer.name = str(folder)
    config.train_cfg.max_iters = 12
    config.default_hooks.checkpoint.interval = 4
    config.custom_hooks[0].update(
        interval=2,
        units_per_step=150,
        min_channels=2,
        divisor=1,  # the widths are small
        input_shape=(3, 64, 64),
    )
    config.custom_hooks[0].update(hook)
    return config


def full(name):
    """A config of MMDetection, all stages of its backbone trained."""
    config = get_config(f'mmdet::{name}')
    config.model.backbone.frozen_stages = -1
    return config


def slim(name):
    """The same detector with a ResNet-18, fewer channels, classes and RoIs."""
    config = full(name)
    model = config.model
    model.backbone.update(depth=18, base_channels=8)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    model.rpn_head.update(in_channels=8, feat_channels=8)
    narrow = dict(out_channels=8, in_channels=8, num_classes=3, conv_out_channels=8)
    narrow |= dict(fc_out_channels=12)
    for part in model.roi_head.values():
        for node in part if isinstance(part, list) else [part]:
            if isinstance(node, dict):
                node.update({k: v for k, v in narrow.items() if k in node})
    rcnn = model.train_cfg.rcnn
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.num = 16
    return config


def slim_retinanet(device='cpu', **backbone):
    """A RetinaNet of a few channels in single precision, and a batch for it."""
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    options = dict(depth=18, base_channels=8, frozen_stages=-1, init_cfg=None)
    cfg.model.backbone.update(options | backbone)
    # Three levels: on maps of one pixel, bfloat16 kernels of torch for some CPUs give
    # gradients of weights that are not even finite.
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8, num_outs=3)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8, num_classes=3)
    cfg.model.bbox_head.anchor_generator.strides = [8, 16, 32]
    torch.manual_seed(0)
    model = build_model(cfg).to(device)
    return model, BatchCalls(model, demo_batch(cfg, 2, (64, 64)))


def classifier(backbone, channels):
    """A config that classifies with ``backbone``, whose last stage has ``channels``."""
    pools = backbone['type'] == 'ConvNeXt'  # before its last norm
    head = dict(
        type='LinearClsHead',
        num_classes=4,
        in_channels=channels,
        loss=dict(type='CrossEntropyLoss'),
    )
    return Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(num_classes=4, mean=[120.0] * 3, std=[60.0] * 3),
            model=dict(
                type='ImageClassifier',
                backbone=backbone,
                neck=None if pools else dict(type='GlobalAveragePooling'),
                head=head,
            ),
        )
    )
