# Prune ResNet-20 to half its MACs, then stop. tools/ablation.py runs it with
# other settings of the hook (the paper's -F, -U and -I), too.
_base_ = ['./resnet20_cifar10.py']

load_from = 'work_dirs/resnet20_cifar10/epoch_3.pth'

max_iters = 4000  # an upper bound: the hook stops at its target
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters,
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))

optim_wrapper = dict(optimizer=dict(lr=0.002))  # a tenth of the training's
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=250, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)

custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=25,
        normalize='memory',
        target=dict(flops=0.5),
        units_per_step=4,
        input_shape=(3, 32, 32),
    )
]
