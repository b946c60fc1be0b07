# What importance is divided by at equal predicted latency: half of the BCCD RetinaNet's
# time in onnxruntime, by a profile that is measured first:
#   python tools/profile_latency.py configs/bccd/retinanet_mobilenetv2_fpn_bccd.py \
#       --input-shape 3 256 320 --out retinanet_bccd.json
baseline = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd.py'
prune = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd_prune.py'
finetune = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd_finetune.py'

_profile = dict(latency_profile='retinanet_bccd.json')
variants = [
    dict(name=f'-{name[0].upper()}', pruning=dict(normalize=name, **_profile))
    for name in ('latency', 'memory', 'flops')
]
targets = [dict(latency=0.5)]
seeds = [0, 1, 2]
