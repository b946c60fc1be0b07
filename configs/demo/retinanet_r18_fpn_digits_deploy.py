# Test, run or export the deployed demo model: give the checkpoint to the tool.
_base_ = ['./retinanet_r18_fpn_digits.py']

model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='work_dirs/retinanet_r18_fpn_digits_deploy/structure.json',
    backbone=dict(init_cfg=None),
)
