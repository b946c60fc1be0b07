# Faster R-CNN on BCCD at half its MACs, by criterion; each is fine-tuned as long as the
# baseline was trained.
baseline = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd.py'
prune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_prune.py'
finetune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_finetune.py'

variants = [
    dict(name='fisher -M', pruning=dict(normalize='memory')),
    dict(name='fisher -F', pruning=dict(normalize='flops')),
    dict(name='l1', pruning=dict(criterion='l1', normalize='memory')),
    dict(
        name='random',
        pruning=dict(
            criterion=dict(type='random', seed='{seed}'),
            normalize='none',
        ),
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
