# Test, run or export the deployed BCCD model: give the checkpoint to the tool.
_base_ = ['./retinanet_mobilenetv2_fpn_bccd.py']

model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='work_dirs/retinanet_mobilenetv2_fpn_bccd_deploy/structure.json',
    backbone=dict(init_cfg=None),
)
