# Fine-tune the pruned RegNetX-1.6GF as long as the original was trained.
_base_ = ['mmpretrain::regnet/regnetx-1.6gf_8xb128_in1k.py', '../_base_/imagenet.py']

train_dataloader = val_dataloader = test_dataloader = {{_base_.imagenet}}

pruned = (
    'work_dirs/regnetx-1.6gf_8xb128_in1k_prune_memory/'
    'regnetx-1.6gf_8xb128_in1k_prune_memory_flops50.pth'
)
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    backbone=dict(init_cfg=None),
)
load_from = pruned
