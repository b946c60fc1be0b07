# Fine-tune the pruned ResNet-20 with its unpruned baseline as teacher.
_base_ = ['./resnet20_cifar10_finetune.py']

custom_hooks = [
    dict(
        type='DistillationHook',
        checkpoint='work_dirs/resnet20_cifar10/epoch_3.pth',
    )
]
