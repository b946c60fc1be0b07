# The unpruned baseline on BCCD: about an hour on two CPU cores.
_base_ = [
    '../_base_/models/faster-rcnn_mobilenetv2_fpn_slim.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/adamw.py',
    '../_base_/runtime.py',
]

max_epochs = 48
train_cfg = dict(max_epochs=max_epochs, val_interval=16)
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
