# Fine-tune the pruned demo model as long as its baseline was trained.
_base_ = ['./retinanet_r18_fpn_digits.py']

pruned = (
    'work_dirs/retinanet_r18_fpn_digits_prune/'
    'retinanet_r18_fpn_digits_prune_flops50.pth'
)
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    backbone=dict(init_cfg=None),
)
load_from = pruned
