# Prune the BCCD baseline to half its MACs, then stop.
_base_ = ['./faster-rcnn_mobilenetv2_fpn_bccd.py']

load_from = 'work_dirs/faster-rcnn_mobilenetv2_fpn_bccd/epoch_48.pth'

max_iters = 1000  # an upper bound: the hook stops at its target
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters,
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))
val_cfg = None
val_dataloader = None
val_evaluator = None

optim_wrapper = dict(optimizer=dict(lr=1e-4))  # a tenth of the training's
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=50))
log_processor = dict(by_epoch=False)

custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=10,
        normalize='memory',
        target=dict(flops=0.5),
        units_per_step=250,
        min_channels=4,
        input_shape=(3, 256, 320),
    )
]
