# Zero weights on CIFAR-10: ResNet-20 trained on for one epoch with all its weights,
# with a fifth of them, and with two of every four.
baseline = 'configs/cifar10/resnet20_cifar10.py'
prune = 'configs/cifar10/resnet20_cifar10_prune.py'  # for runs that prune: none here
finetune = 'configs/cifar10/resnet20_cifar10_finetune.py'

_one_epoch = {
    'load_from': '{baseline_checkpoint}',
    'train_cfg.max_epochs': 1,
    'param_scheduler.T_max': 1,
    'param_scheduler.end': 1,
}
variants = [
    dict(name='dense, trained on', train=_one_epoch),
    dict(
        name='80 % zero, by magnitude',
        config='configs/cifar10/resnet20_cifar10_sparse80.py',
        train={
            **_one_epoch,
            'custom_hooks.0.by_epoch': False,
            'custom_hooks.0.end': 520,  # two thirds of the epoch, as in the config
            'custom_hooks.0.interval': 20,
        },
    ),
    dict(
        name='2:4, SR-STE',
        config='configs/cifar10/resnet20_cifar10_2to4.py',
        train=_one_epoch,
    ),
]
seeds = [0, 1, 2]
latency_rounds = 0  # dense runtimes gain nothing from zeros
