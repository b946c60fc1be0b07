# Prune FSAF R50-FPN to half its MACs, importance normalised by memory
# (paper section 6: a tenth of the training's learning rate, no frozen stages).
_base_ = ['mmdet::fsaf/fsaf_r50_fpn_1x_coco.py', '../_base_/coco_prune.py']

load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/fsaf/'
    'fsaf_r50_fpn_1x_coco/fsaf_r50_fpn_1x_coco-94ccc51f.pth'
)
model = {{_base_.pruning.model}}
train_cfg = {{_base_.pruning.train_cfg}}
train_dataloader = {{_base_.pruning.train_dataloader}}
val_cfg = val_dataloader = val_evaluator = None

optim_wrapper = dict(optimizer=dict(lr=0.001))
param_scheduler = []
default_hooks = {{_base_.pruning.default_hooks}}
log_processor = {{_base_.pruning.log_processor}}
custom_hooks = [{{_base_.pruning.hook}}]
