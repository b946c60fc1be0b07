# What a decision takes on CIFAR-10, ResNet-20 at half its MACs, each followed by half
# an epoch of fine-tuning: eighteen runs of two to five minutes on one core.
_base_ = ['./cifar10_criteria.py']

_exact = dict(interval=10, normalize='memory', divisor=1)
_ways = {
    'one unit': dict(units_per_step=1),
    'six units': dict(units_per_step=6),
    'auto': dict(units_per_step='auto'),
    # What may make a decision of six units safer: the mean of three times as many
    # iterations, a floor, and steps that get smaller near the end.
    'six units, 30 iterations': dict(units_per_step=6, interval=30),
    'six units, at least 4': dict(units_per_step=6, min_channels=4),
    'cubic': dict(units_per_step=None, schedule=dict(type='cubic', iterations=200)),
}
variants = [
    dict(
        name=name,
        pruning=dict(_exact, **way),
        finetune={{_base_._half_an_epoch}},
    )
    for name, way in _ways.items()
]
targets = [dict(flops=0.5)]
