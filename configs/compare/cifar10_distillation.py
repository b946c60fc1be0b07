# What a teacher adds to half an epoch of fine-tuning on CIFAR-10. Both variants share
# their pruning.
baseline = 'configs/cifar10/resnet20_cifar10.py'
prune = 'configs/cifar10/resnet20_cifar10_prune.py'
finetune = 'configs/cifar10/resnet20_cifar10_finetune.py'

_iterations = 390
_half_an_epoch = dict(
    train_cfg=dict(_delete_=True, by_epoch=False, max_iters=_iterations),
    param_scheduler=dict(
        _delete_=True,
        type='CosineAnnealingLR',
        by_epoch=False,
        T_max=_iterations,
        end=_iterations,
    ),
    train_dataloader=dict(sampler=dict(type='InfiniteSampler')),
    default_hooks=dict(checkpoint=dict(by_epoch=False, interval=_iterations)),
    log_processor=dict(by_epoch=False),
)
_brisk = dict(interval=10)
variants = [
    dict(name='labels', pruning=_brisk, finetune=_half_an_epoch),
    dict(
        name='labels and teacher',
        pruning=_brisk,
        finetune=dict(
            custom_hooks=[dict(type='DistillationHook')],
            **_half_an_epoch,
        ),
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
latency_rounds = 0
