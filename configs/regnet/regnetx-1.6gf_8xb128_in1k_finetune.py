# Fine-tune the pruned RegNetX-1.6GF as long as the original was trained.
_base_ = ['mmpretrain::regnet/regnetx-1.6gf_8xb128_in1k.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

data_root = 'data/imagenet/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

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
