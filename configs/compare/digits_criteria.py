# The paper's variants on the demo's detector at two targets, and a detector of its
# class that has half the MACs from the start, trained as long as the baseline was.
baseline = 'configs/demo/retinanet_r18_fpn_digits.py'
checkpoint = 'configs/demo/retinanet_r18_fpn_digits.pth'
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
            'model.backbone.base_channels': 10,
            'model.neck.in_channels': [10, 20, 40, 80],
            'model.neck.out_channels': 32,
            'model.bbox_head.in_channels': 32,
            'model.bbox_head.feat_channels': 32,
        },
    ),
]
targets = [dict(flops=0.5), dict(flops=0.3)]
seeds = [0, 1, 2]
