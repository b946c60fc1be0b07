# The paper's variants on the demo's detector at two targets, and a detector of its
# class that is narrow from the start, trained as long.
baseline = 'configs/demo/retinanet_r18_fpn_digits.py'
prune = 'configs/demo/retinanet_r18_fpn_digits_prune.py'
finetune = 'configs/demo/retinanet_r18_fpn_digits_finetune.py'

variants = [
    dict(name='fisher -M', pruning=dict(normalize='memory')),
    dict(name='fisher -U', pruning=dict(normalize='none')),
    dict(
        name='random',
        pruning=dict(
            criterion=dict(type='random', seed='{seed}'),  # another order for each seed
            normalize='none',
        ),
    ),
    dict(
        name='narrow, from scratch',
        train={
            'model.backbone.base_channels': 24,
            'model.neck.in_channels': [24, 48, 96, 192],
        },
    ),
]
targets = [dict(flops=0.5), dict(flops=0.3)]
seeds = [0, 1, 2]
