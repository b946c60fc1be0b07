# The comparison of bccd_retinanet.py for a two-stage detector.
_base_ = ['./bccd_retinanet.py']

baseline = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd.py'
prune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_prune.py'
finetune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_finetune.py'
