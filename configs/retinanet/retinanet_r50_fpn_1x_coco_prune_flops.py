# Prune RetinaNet R50-FPN as its neighbour does, importance normalised by flops.
_base_ = ['./retinanet_r50_fpn_1x_coco_prune_memory.py']

custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=10,
        normalize='flops',
        target=dict(flops=0.5),
        input_shape=(3, 800, 1280),
    )
]
