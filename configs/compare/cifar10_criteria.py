# Criteria on CIFAR-10, ResNet-20 at half and at 30 % of its MACs, each followed by half
# an epoch of fine-tuning: seventy-two runs of two to four minutes on one core.
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
# Multiples of one: the layers have 16 to 64 channels.
_brisk = dict(interval=10, units_per_step=8, divisor=1)
_ways = {
    'fisher -M': dict(normalize='memory'),
    'fisher -F': dict(normalize='flops'),
    'fisher -U': dict(normalize='none'),
    'fisher -I': dict(normalize='memory', coupled=False),
    'taylor -M': dict(criterion='taylor', normalize='memory'),
    'fpgm -M': dict(criterion='fpgm', normalize='memory'),
    'bn_scale -M': dict(criterion='bn_scale', normalize='memory'),
    'l1 -M': dict(criterion='l1', normalize='memory'),
    'l1': dict(criterion='l1', normalize='none'),
    # Magnitudes of different layers do not compare: two ways not to let them.
    'l1 -M, at least 8': dict(criterion='l1', normalize='memory', min_channels=8),
    'l1 local': dict(criterion='l1', normalize='none', scope='local'),
    # Another order for each seed.
    'random': dict(criterion=dict(type='random', seed='{seed}'), normalize='none'),
}
variants = [
    dict(name=name, pruning=dict(_brisk, **way), finetune=_half_an_epoch)
    for name, way in _ways.items()
]
targets = [dict(flops=0.5), dict(flops=0.3)]
seeds = [0, 1, 2]
latency_rounds = 0
