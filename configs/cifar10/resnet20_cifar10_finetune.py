# Fine-tune the pruned ResNet-20 as long as the original was.
_base_ = ['./resnet20_cifar10.py']

pruned = 'work_dirs/resnet20_cifar10_prune/resnet20_cifar10_prune_flops50.pth'
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    backbone=dict(init_cfg=None),
)
load_from = pruned
