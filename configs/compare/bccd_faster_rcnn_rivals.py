# The comparison of bccd_retinanet_rivals.py for a two-stage detector, whose own profile
# bccd.json has to be.
_base_ = ['./bccd_retinanet_rivals.py']

baseline = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd.py'
prune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_prune.py'
finetune = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd_finetune.py'
