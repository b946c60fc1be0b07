# Train ResNet-20 on with 2:4 sparsity: two of every four weights along inputs go.
_base_ = ['./resnet20_cifar10.py']

load_from = 'work_dirs/resnet20_cifar10/epoch_3.pth'
custom_hooks = [dict(type='SparsityHook', kind='nm', n=2, m=4)]
