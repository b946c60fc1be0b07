# Test, run or export the deployed ResNet-20: give the checkpoint to the tool.
_base_ = ['./resnet20_cifar10.py']

load_from = None
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='work_dirs/resnet20_cifar10_deploy/structure.json',
    backbone=dict(init_cfg=None),
)
