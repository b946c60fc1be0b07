"""Train, prune and fine-tune a two-stage detector: minutes on two CPU cores.

A Faster R-CNN learns to detect handwritten digits: its backbone and pyramid start from
the RetinaNet in the repository, RPN and RoI head from nothing. It is pruned to half of
its multiply-adds, RPN and RoI head included, fine-tuned, and written as a config and
weights. Run it in the repository, whole or cell by cell (`# %%`).
"""

# %% A config of MMDetection's, as narrow as the RetinaNet
import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.runner import Runner

import mmgfp  # registers the hooks and PrunedModel
from mmgfp.engine.deploy import deploy, read_deployable

DEMO = Path(mmgfp.__file__).parent.parent / 'configs/demo'
WORK = Path(os.environ.get('MMGFP_WORK', 'work_dirs/examples/two_stage'))
ITERATIONS = int(os.environ.get('MMGFP_ITERATIONS', 100))

config = Config.fromfile(DEMO / 'retinanet_r18_fpn_digits.py')
retinanet, width = config.model, config.model.neck.out_channels
config.model = get_config('mmdet::_base_/models/faster-rcnn_r50_fpn.py').model
for part in ('data_preprocessor', 'backbone', 'neck'):
    config.model[part] = retinanet[part]
changes = {
    'rpn_head': dict(in_channels=width, feat_channels=width),
    'rpn_head.anchor_generator': dict(scales=[3], strides=[8, 16, 32, 64]),
    'roi_head.bbox_roi_extractor.out_channels': width,
    'roi_head.bbox_roi_extractor.featmap_strides': [8, 16, 32],
    'roi_head.bbox_roi_extractor.finest_scale': 28,
    'roi_head.bbox_head': dict(in_channels=width, num_classes=10),
    'roi_head.bbox_head.fc_out_channels': 128,
    'train_cfg.rpn_proposal.max_per_img': 200,
    'train_cfg.rcnn.sampler.num': 64,
    'test_cfg.rpn.max_per_img': 200,
}
config.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
for split in ('train', 'val', 'test'):  # fewer images than the demo has
    dataset = config[f'{split}_dataloader'].dataset
    dataset.data_root = str(WORK / 'digits')
    dataset.spec.update(num_train=8 * ITERATIONS, num_val=60)
for split in ('val', 'test'):
    annotations = str(WORK / 'digits/annotations/val.json')
    config[f'{split}_evaluator'].ann_file = annotations
WORK.mkdir(parents=True, exist_ok=True)
config.dump(WORK / 'faster_rcnn.py')  # an ordinary config: nothing in it prunes


def train(config, name, count, rate, load_from):
    """Train for so many iterations, and validate at their end; return the runner."""
    config.work_dir, config.load_from = str(WORK / name), str(load_from)
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=count)
    config.train_cfg['val_interval'] = count
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    config.log_processor = dict(by_epoch=False)
    config.default_hooks.checkpoint.update(by_epoch=False, interval=count)
    config.param_scheduler = []
    config.optim_wrapper.optimizer.lr = rate
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def score(runner):
    """The mAP of the last validation, in percent."""
    return 100 * runner.message_hub.get_scalar('val/coco/bbox_mAP').current()


# %% Train it: weights of layers that the RetinaNet lacks stay random, as the log says
config, count = Config.fromfile(WORK / 'faster_rcnn.py'), 3 * ITERATIONS
demo = DEMO / 'retinanet_r18_fpn_digits.pth'
before = score(train(config, 'train', count, 1e-3, demo))

# %% Prune it while it trains on, at a tenth of the rate
config = Config.fromfile(WORK / 'faster_rcnn.py')
config.val_cfg = config.val_dataloader = config.val_evaluator = None
config.custom_hooks = [
    dict(
        type='FisherPruningHook',
        target=dict(flops=0.5),
        normalize='memory',
        interval=max(ITERATIONS // 20, 1),
        iterations=ITERATIONS,
        divisor=4,  # the layers are narrow
        input_shape=(3, 128, 128),
    )
]
train(config, 'prune', 2 * ITERATIONS, 1e-4, WORK / f'train/iter_{count}.pth')
pruned = WORK / 'prune/faster_rcnn_flops50.pth'
costs = torch.load(pruned, weights_only=True)['meta']['costs']

# %% Fine-tune it: the same model, cut down to what the file says
config, count = Config.fromfile(WORK / 'faster_rcnn.py'), 2 * ITERATIONS
model = dict(type='PrunedModel', architecture=config.model, structure=str(pruned))
config.model = model
after = score(train(config, 'finetune', count, 5e-4, pruned))

# %% Write it as a folder that is complete in itself
model = read_deployable(config, WORK / f'finetune/iter_{count}.pth')
deploy(config, model, WORK / 'small', 'small')
print(f'trained: mAP {before:.1f}; pruned to {costs["macs"]["ratio"]:.1%} of the MACs')
print(f'fine-tuned: mAP {after:.1f}; it is in {WORK / "small"}')
