# Prune ResNeXt-50 32x4d to half its MACs, importance normalised by memory.
_base_ = [
    'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py',
    '../_base_/imagenet_prune.py',
]

load_from = (
    'https://download.openmmlab.com/mmclassification/v0/resnext/'
    'resnext50_32x4d_b32x8_imagenet_20210429-56066e27.pth'
)

max_iters = 110_400  # an upper bound: the hook stops at its target
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters,
)
train_dataloader = {{_base_.pruning.train_dataloader}}
test_dataloader = {{_base_.imagenet}}
val_cfg = val_dataloader = val_evaluator = None

# A tenth of the training's rate, as the paper has it for detection.
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = []
default_hooks = {{_base_.pruning.default_hooks}}
custom_hooks = [{{_base_.pruning.hook}}]
