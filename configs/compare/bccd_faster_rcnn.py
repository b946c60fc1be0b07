# Faster R-CNN on BCCD at half its MACs, by criterion; each is fine-tuned as long as the
# baseline was trained. 'narrow' has fewer channels everywhere and about as many MACs,
# and is trained from ImageNet weights of its layers that have any: none.
baseline = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd.py'
prune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_prune.py'
finetune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_finetune.py'

_common = dict(interval=10, units_per_step=100)
variants = [
    dict(name='fisher -M', pruning=dict(normalize='memory', **_common)),
    dict(name='fisher -F', pruning=dict(normalize='flops', **_common)),
    dict(name='l1', pruning=dict(criterion='l1', normalize='memory', **_common)),
    dict(
        name='random',
        pruning=dict(
            criterion=dict(type='random', seed='{seed}'), normalize='none', **_common
        ),
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
