# ResNet-20 on CIFAR-10: published weights, trained on for a few epochs on the
# images at hand. tools/convert_resnet_cifar.py writes the weights.
_base_ = [
    '../_base_/datasets/cifar10.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(
    imports=['mmgfp', 'mmgfp.demo.resnet_cifar'], allow_failed_imports=False
)

load_from = 'data/weights/resnet20_cifar10.pth'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='SlimResNetCIFAR', depth=20),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)

max_epochs = 3
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4)
)
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=max_epochs,
    end=max_epochs,
    convert_to_iter_based=True,
)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
randomness = dict(seed=0, deterministic=True)
