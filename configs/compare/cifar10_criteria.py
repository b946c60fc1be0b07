# Criteria on CIFAR-10, ResNet-20 at half its MACs: fifteen runs of pruning and three
# epochs of fine-tuning.
baseline = 'configs/cifar10/resnet20_cifar10.py'
prune = 'configs/cifar10/resnet20_cifar10_prune.py'
finetune = 'configs/cifar10/resnet20_cifar10_finetune.py'

variants = [
    dict(name='fisher -M', pruning=dict(normalize='memory')),
    dict(name='fisher -F', pruning=dict(normalize='flops')),
    dict(name='fisher -U', pruning=dict(normalize='none')),
    dict(name='l1', pruning=dict(criterion='l1', normalize='memory')),
    dict(
        name='random',
        pruning=dict(
            criterion=dict(type='random', seed='{seed}'),  # another order for each seed
            normalize='none',
        ),
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
batches = [1, 64]
