# What importance is divided by at equal predicted latency: half of ResNet-20's time in
# onnxruntime on batches of 64, by a profile that is measured first:
#   python tools/profile_latency.py configs/cifar10/resnet20_cifar10.py --batch 64 \
#       --input-shape 3 32 32 --out resnet20.json
baseline = 'configs/cifar10/resnet20_cifar10.py'
prune = 'configs/cifar10/resnet20_cifar10_prune.py'
finetune = 'configs/cifar10/resnet20_cifar10_finetune.py'

_common = dict(latency_profile='resnet20.json', interval=10, units_per_step=8)
variants = [
    dict(name=f'-{name[0].upper()}', pruning=dict(normalize=name, **_common))
    for name in ('latency', 'memory', 'flops')
]
targets = [dict(latency=0.5)]
seeds = [0, 1, 2]
batches = [1, 64]
