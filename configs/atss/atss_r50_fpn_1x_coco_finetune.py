# Fine-tune the pruned ATSS R50-FPN as long as the original was trained.
_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['mmgfp'], allow_failed_imports=False)

pruned = (
    'work_dirs/atss_r50_fpn_1x_coco_prune_memory/'
    'atss_r50_fpn_1x_coco_prune_memory_flops50.pth'
)
model = dict(
    _delete_=True,
    type='PrunedModel',
    architecture={{_base_.model}},
    structure=pruned,
    # The early stages lost channels too, so they are trained as well.
    backbone=dict(frozen_stages=-1, init_cfg=None),
)
load_from = pruned
