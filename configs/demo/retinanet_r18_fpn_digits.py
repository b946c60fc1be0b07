# The demo's unpruned baseline: ten minutes on one CPU core. README.md says more.
_base_ = [
    '../_base_/models/retinanet_r18_fpn_slim.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/adamw.py',
    '../_base_/runtime.py',
]
custom_imports = dict(imports=['mmgfp', 'mmgfp.demo.digits'])

max_epochs = 30
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
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
