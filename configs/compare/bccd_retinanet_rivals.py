# RetinaNet on BCCD at half its MACs, or 0.6 of its time in onnxruntime, against what
# people would do instead. The baseline had 32 epochs (train_cfg.max_epochs,
# param_scheduler.1.T_max and .end); models are fine-tuned for 12, or for 32 as well.
# What 'fisher -L' divides importance by is measured first:
#   python tools/profile_latency.py configs/bccd/retinanet_mobilenetv2_fpn_bccd.py \
#       --input-shape 3 256 320 --out bccd.json
baseline = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd.py'
prune = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd_prune.py'
finetune = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd_finetune.py'

_12_epochs = {
    'train_cfg.max_epochs': 12,
    'train_cfg.val_interval': 12,
    'param_scheduler.1.T_max': 12,
    'param_scheduler.1.end': 12,
}
_32_epochs = {name: 32 for name in _12_epochs}
# Unpruned models train in the iterations that pruning takes, too: about 4 epochs.
_16_epochs = {name: 16 for name in _12_epochs}
_36_epochs = {name: 36 for name in _12_epochs}
# As long as the baseline was trained (32 epochs), pruned and fine-tuned.
_48_epochs = {name: 48 for name in _12_epochs}

_brisk = dict(interval=5)
_uniform = dict(_brisk, criterion='l1', normalize='none', scope='local')
_random = dict(criterion=dict(type='random', seed='{seed}'), normalize='none')
_latency = dict(normalize='latency', latency_profile='bccd.json')

variants = [
    dict(name='fisher -M', pruning=_brisk, finetune=_12_epochs),
    dict(name='l1, equal shares', pruning=_uniform, finetune=_12_epochs),
    dict(name='random', pruning=dict(_brisk, **_random), finetune=_12_epochs),
    dict(
        name='fisher -L',
        pruning=dict(_brisk, **_latency),
        finetune=_12_epochs,
        targets=[dict(latency=0.6)],
    ),
    dict(
        name='equal shares, from scratch',
        pruning=_uniform,
        finetune={'model.init': 'scratch', **_48_epochs},
    ),
    dict(
        name='unpruned, trained on',
        train={'load_from': '{baseline_checkpoint}', **_16_epochs},
    ),
    dict(name='fisher -M, 32 epochs', pruning=_brisk, finetune=_32_epochs),
    dict(
        name='fisher -L, half the MACs, 32 epochs',
        pruning=dict(_brisk, **_latency),
        finetune=_32_epochs,
    ),
    dict(
        name='unpruned, trained on, 36 epochs',
        train={'load_from': '{baseline_checkpoint}', **_36_epochs},
    ),
]
targets = [dict(flops=0.5)]
seeds = [0, 1, 2]
latency_rounds = 0
