# Test, run or export the deployed Faster R-CNN: give the checkpoint to the tool.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure='work_dirs/faster-rcnn_r50_fpn_1x_coco_deploy/structure.json',
    backbone=dict(init_cfg=None),
)
