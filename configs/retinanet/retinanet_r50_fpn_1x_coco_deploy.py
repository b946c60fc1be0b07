# Test, run or export the deployed RetinaNet: give the checkpoint to the tool.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='work_dirs/retinanet_r50_fpn_1x_coco_deploy/structure.json',
    backbone=dict(init_cfg=None),
)
