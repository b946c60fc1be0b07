# How many units a decision takes on CIFAR-10, ResNet-20 at half its MACs, each followed
# by half an epoch of fine-tuning: nine runs of two to nine minutes on one core.
_base_ = ['./cifar10_criteria.py']

_exact = dict(interval=10, normalize='memory', divisor=1)
variants = [
    dict(
        name=name,
        pruning=dict(_exact, units_per_step=units),
        finetune={{_base_._half_an_epoch}},
    )
    for name, units in {'one unit': 1, 'six units': 6, 'auto': 'auto'}.items()
]
targets = [dict(flops=0.5)]
