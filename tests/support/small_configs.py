"""Configs of small models of every kind, with data for them."""

import json

import cv2
import numpy as np
from mmengine.config import Config

from mmgfp.demo.digits import DigitsSpec, write_digits
from support.configs import FASTER, MASK, classifier, slim
from support.tooling import ROOT

DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits.py'
SPEC = dict(num_train=16, num_val=4, size=64, max_side=32)


def write_boxes_as_masks(root):
    """Draw the digits, and let the outline of each be its box."""
    write_digits(root, DigitsSpec(**SPEC))
    for path in (root / 'annotations').iterdir():
        coco = json.loads(path.read_text())
        for note in coco['annotations']:
            x, y, w, h = note['bbox']
            note['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        path.write_text(json.dumps(coco))


def detection(folder, name):
    """A config that trains a small detector on 16 images of digits."""
    config = Config.fromfile(DEMO)
    if name is None:
        config.model.backbone.base_channels = 8
        config.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
        config.model.bbox_head.update(in_channels=8, feat_channels=8)
        config.model.test_cfg.score_thr = 0.0
    else:
        config.model = slim(name).model
        config.model.backbone.init_cfg = None
        for head in ('bbox_head', 'mask_head'):
            if head in config.model.roi_head:
                config.model.roi_head[head].num_classes = 10
        config.model.test_cfg.rcnn.score_thr = 0.0
    root = folder / 'digits'
    write_boxes_as_masks(root)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.batch_size = 4
        loader.dataset.update(data_root=str(root), spec=SPEC)
        for step in loader.dataset.pipeline:
            if step['type'] == 'LoadAnnotations':
                step['with_mask'] = name == MASK
            elif step['type'] == 'Resize':
                step['scale'] = (64, 64)
    metric = ['bbox', 'segm'] if name == MASK else 'bbox'
    for split in ('val', 'test'):
        evaluator = dict(ann_file=f'{root}/annotations/val.json', metric=metric)
        config[f'{split}_evaluator'].update(evaluator)
    return config


def classification(folder):
    """A config that trains a small ResNet on noise of four classes."""
    backbone = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)
    config = classifier(backbone, 64)
    rng = np.random.default_rng(0)
    for i in range(16):
        path = folder / f'images/{i % 4}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    steps = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    dataset = dict(type='CustomDataset', data_prefix=str(folder / 'images'))
    loader = dict(batch_size=4, num_workers=0, dataset=dict(dataset, pipeline=steps))
    config.merge_from_dict(
        dict(
            custom_imports=dict(imports=['mmgfp']),
            randomness=dict(seed=0),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            train_dataloader=dict(loader, sampler=dict(type='DefaultSampler')),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook')),
        )
    )
    for split in ('val', 'test'):
        sampler = dict(type='DefaultSampler', shuffle=False)
        config[f'{split}_dataloader'] = dict(loader, sampler=sampler)
        config[f'{split}_evaluator'] = dict(type='Accuracy')
        config[f'{split}_cfg'] = dict()
    return config


KINDS = dict(retinanet=None, faster=FASTER, mask=MASK)


def config_of(folder, kind):
    """A config of 'retinanet', 'faster', 'mask' or 'classifier', with its data."""
    if kind == 'classifier':
        return classification(folder)
    return detection(folder, KINDS[kind])


def stages(folder, kind, ratio=0.7):
    """Write the configs of training, pruning and fine-tuning; return their paths."""
    config = config_of(folder, kind)
    config.param_scheduler = []
    config.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    paths = [folder / f'{stage}.py' for stage in ('small', 'prune', 'finetune')]
    config.dump(paths[0])
    prune, tune = Config.fromfile(paths[0]), Config.fromfile(paths[0])
    prune.train_cfg = dict(type='IterBasedTrainLoop', max_iters=200, val_interval=200)
    prune.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    prune.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    prune.log_processor = dict(by_epoch=False)
    prune.default_hooks.checkpoint.by_epoch = False
    hook = dict(type='FisherPruningHook', interval=2, target=dict(flops=ratio))
    # The models are too narrow for the divisor that runs begin with.
    hook |= dict(units_per_step=40, divisor=1, input_shape=(3, 64, 64))
    prune.custom_hooks = [hook]
    prune.dump(paths[1])
    tune.model = dict(
        type='PrunedModel',
        architecture=config.model,
        structure='',
        backbone=dict(init_cfg=None),
    )
    tune.dump(paths[2])
    return paths
