# Prune Faster R-CNN R50-FPN to half its MACs, importance normalised by memory
# (paper section 6: a tenth of the training's learning rate, no frozen stages).
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
    'faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth'
)
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))

max_iters = 140_000  # an upper bound: the hook stops at its target
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters,
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))
val_cfg = None
val_dataloader = None
val_evaluator = None

optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)

custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=10,
        normalize='memory',
        target=dict(flops=0.5),
        input_shape=(3, 800, 1280),
    )
]
