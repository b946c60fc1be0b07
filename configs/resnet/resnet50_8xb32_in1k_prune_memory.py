# Prune ResNet-50 to half its MACs, importance normalised by memory. The interval
# is the paper's for classification (algorithm 2); the learning rate is a tenth of
# the training's, as the paper has it for detection.
_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

load_from = (
    'https://download.openmmlab.com/mmclassification/v0/resnet/'
    'resnet50_8xb32_in1k_20210831-ea4938fc.pth'
)

max_iters = 286_400  # an upper bound: the hook stops at its target
train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=max_iters,
)
data_root = 'data/imagenet/'
train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root),
)
test_dataloader = dict(dataset=dict(data_root=data_root))
val_cfg = None
val_dataloader = None
val_evaluator = None

optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)

custom_hooks = [
    dict(
        type='FisherPruningHook',
        interval=25,
        normalize='memory',
        target=dict(flops=0.5),
        input_shape=(3, 224, 224),
    )
]
