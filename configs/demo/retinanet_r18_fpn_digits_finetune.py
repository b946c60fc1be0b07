# Fine-tune the pruned demo model for half the epochs of its baseline.
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

max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        T_max=max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
