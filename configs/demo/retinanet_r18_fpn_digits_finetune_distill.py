# Fine-tune the pruned demo model with its unpruned baseline as teacher.
_base_ = ['./retinanet_r18_fpn_digits_finetune.py']

custom_hooks = [
    dict(
        type='DistillationHook',
        checkpoint='work_dirs/retinanet_r18_fpn_digits/epoch_6.pth',
    )
]
