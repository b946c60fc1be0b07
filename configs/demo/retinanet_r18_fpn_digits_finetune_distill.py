# Fine-tune the pruned demo model with its unpruned baseline as teacher.
_base_ = ['./retinanet_r18_fpn_digits_finetune.py']

custom_hooks = [
    dict(
        type='DistillationHook',
        checkpoint='configs/demo/retinanet_r18_fpn_digits.pth',
    )
]
