# What a teacher adds to eight epochs of fine-tuning on the demo's detector. Both
# variants share their pruning.
baseline = 'configs/demo/retinanet_r18_fpn_digits.py'
checkpoint = 'configs/demo/retinanet_r18_fpn_digits.pth'
prune = 'configs/demo/retinanet_r18_fpn_digits_prune.py'
finetune = 'configs/demo/retinanet_r18_fpn_digits_finetune.py'

_eight_epochs = {
    'train_cfg.max_epochs': 8,
    'train_cfg.val_interval': 8,
    'param_scheduler.1.T_max': 8,
    'param_scheduler.1.end': 8,
}
variants = [
    dict(name='labels', finetune=_eight_epochs),
    dict(
        name='labels and teacher',
        finetune={**_eight_epochs, 'custom_hooks': [dict(type='DistillationHook')]},
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
latency_rounds = 0
