# Test, run or export the deployed ResNet-50: give the checkpoint to the tool.
_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

data_root = 'data/imagenet/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='work_dirs/resnet50_8xb32_in1k_deploy/structure.json',
    backbone=dict(init_cfg=None),
)
