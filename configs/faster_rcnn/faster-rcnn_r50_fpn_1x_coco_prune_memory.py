# Prune Faster R-CNN R50-FPN to half its MACs, importance normalised by memory
# (paper section 6: a tenth of the training's learning rate, no frozen stages).
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/coco_prune.py',
]

load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
    'faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth'
)
model = {{_base_.pruning.model}}
train_cfg = {{_base_.pruning.train_cfg}}
train_dataloader = {{_base_.pruning.train_dataloader}}
val_cfg = val_dataloader = val_evaluator = None

optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = []
default_hooks = {{_base_.pruning.default_hooks}}
log_processor = {{_base_.pruning.log_processor}}
custom_hooks = [{{_base_.pruning.hook}}]
