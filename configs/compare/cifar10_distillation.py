# What a teacher adds to one epoch of fine-tuning on CIFAR-10, with two weights of its
# term. The variants share their pruning.
baseline = 'configs/cifar10/resnet20_cifar10.py'
prune = 'configs/cifar10/resnet20_cifar10_prune.py'
finetune = 'configs/cifar10/resnet20_cifar10_finetune.py'

_one_epoch = dict(
    max_epochs=1,
    train_cfg=dict(max_epochs=1),
    param_scheduler=dict(T_max=1, end=1),
)
_brisk = dict(interval=10, units_per_step=4)
variants = [
    dict(name='labels', pruning=_brisk, finetune=_one_epoch),
    dict(
        name='labels and teacher',
        pruning=_brisk,
        finetune=dict(custom_hooks=[dict(type='DistillationHook')], **_one_epoch),
    ),
    dict(
        name='labels and teacher, weight 0.3',
        pruning=_brisk,
        finetune=dict(
            custom_hooks=[dict(type='DistillationHook', weights=dict(cls=0.3))],
            **_one_epoch,
        ),
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
latency_rounds = 0
