# Fine-tune the pruned BCCD model as long as its baseline was trained.
_base_ = ['./faster-rcnn_mobilenetv2_fpn_bccd.py']

pruned = (
    'work_dirs/faster-rcnn_mobilenetv2_fpn_bccd_prune/'
    'faster-rcnn_mobilenetv2_fpn_bccd_prune_flops50.pth'
)
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    backbone=dict(init_cfg=None),
)
load_from = pruned
