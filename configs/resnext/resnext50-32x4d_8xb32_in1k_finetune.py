# Fine-tune the pruned ResNeXt-50 32x4d as long as the original was trained.
_base_ = ['mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py', '../_base_/imagenet.py']

train_dataloader = val_dataloader = test_dataloader = {{_base_.imagenet}}

pruned = (
    'work_dirs/resnext50-32x4d_8xb32_in1k_prune_memory/'
    'resnext50-32x4d_8xb32_in1k_prune_memory_flops50.pth'
)
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    backbone=dict(init_cfg=None),
)
load_from = pruned
