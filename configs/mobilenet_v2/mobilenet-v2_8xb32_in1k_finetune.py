# Fine-tune the pruned MobileNetV2 as long as the original was trained.
_base_ = ['mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

data_root = 'data/imagenet/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

pruned = (
    'work_dirs/mobilenet-v2_8xb32_in1k_prune_memory/'
    'mobilenet-v2_8xb32_in1k_prune_memory_flops50.pth'
)
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    backbone=dict(init_cfg=None),
)
load_from = pruned
