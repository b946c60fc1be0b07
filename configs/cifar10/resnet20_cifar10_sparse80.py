# Train ResNet-20 on while 80 % of its weights go: unstructured, by magnitude.
_base_ = ['./resnet20_cifar10.py']

load_from = 'work_dirs/resnet20_cifar10/epoch_3.pth'
custom_hooks = [
    dict(
        type='SparsityHook',
        kind='magnitude',
        sparsity=0.8,
        schedule='cubic',
        by_epoch=True,
        end=2,  # the third epoch makes up for what went
        interval=50,
    )
]
