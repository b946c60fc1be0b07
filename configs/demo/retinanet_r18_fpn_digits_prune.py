# Prune the demo's baseline to half its MACs, then stop.
_base_ = ['./retinanet_r18_fpn_digits.py']

load_from = 'configs/demo/retinanet_r18_fpn_digits.pth'

max_iters = 2000  # an upper bound: the hook stops at its target
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

optim_wrapper = dict(optimizer=dict(lr=2e-4))  # a tenth of the training's
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=50))
log_processor = dict(by_epoch=False)

custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=10,
        normalize='memory',
        target=dict(flops=0.5),
        units_per_step=12,
        divisor=4,  # the layers are narrow
        min_channels=4,
        input_shape=(3, 128, 128),
    )
]
