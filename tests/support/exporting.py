"""Slim detectors that detect something, their predictions, and files of graphs."""

import functools
import warnings

import torch
from mmdet.structures import DetDataSample
from mmengine.hub import get_config
from torch import nn

from mmgfp.engine.model_building import build_model
from support.configs import FASTER, MASK, slim

SIZE = (128, 160)

#: Overrides of MMDetection's configs that leave few channels and three classes.
RESNET = dict(
    backbone=dict(depth=18, base_channels=8, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3),
)
CSP = dict(
    backbone=dict(widen_factor=0.125, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3),
)
ONE_STAGE = {
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco.py', RESNET),
    'fsaf': ('fsaf/fsaf_r50_fpn_1x_coco.py', RESNET),
    'atss': ('atss/atss_r50_fpn_1x_coco.py', RESNET),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', RESNET),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco.py', RESNET),
    'yolox': ('yolox/yolox_tiny_8xb8-300e_coco.py', CSP),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', CSP),
    'ssdlite': (
        'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
        dict(bbox_head=dict(num_classes=3)),
    ),
}
TWO_STAGE = {'faster': FASTER, 'mask': MASK}


def detector_config(name):
    """A slim config whose limits on detections all come into play on a small image."""
    if name in TWO_STAGE:
        config = slim(TWO_STAGE[name])
        test_cfg = config.model.test_cfg
        test_cfg.rpn.update(nms_pre=200, max_per_img=120)
        test_cfg.rcnn.update(score_thr=0.3, max_per_img=40)
        return config
    path, changes = ONE_STAGE[name]
    config = get_config(f'mmdet::{path}')
    config.merge_from_dict(dict(model=changes))
    config.model.test_cfg.update(score_thr=0.3)
    if name != 'yolox':  # it has no limits
        config.model.test_cfg.update(nms_pre=100, max_per_img=40)
    return config


@functools.cache
def lively_detector(name):
    """A slim random detector in eval mode that detects, and two images; shared."""
    torch.manual_seed(0)
    model = build_model(detector_config(name))
    if name == 'ssdlite':
        model.bbox_head.loss_cls = None  # predict of MMDetection looks for it
    image = torch.randn(2, 3, *SIZE)
    enliven(model, image)
    return model, image


def enliven(model, image):
    """Let each layer give values of about unit variance, so that scores spread."""
    seen = set()

    def rescale(layer, args, output):
        if layer in seen:
            return None
        seen.add(layer)
        factor = output.std().clamp(min=1e-6)
        layer.weight.div_(factor)
        return output / factor

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of this batch alone
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            hooks.append(module.register_forward_hook(rescale))
    with torch.no_grad():
        predictions(model.train(), image)
    for hook in hooks:
        hook.remove()
    model.eval()


def predictions(model, image):
    """The detections of MMDetection's own ``predict`` in pixels of the image."""
    size = tuple(image.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, batch_input_shape=size)
    meta['scale_factor'] = (1.0, 1.0)
    samples = [DetDataSample(metainfo=dict(meta)) for _ in image]
    with torch.no_grad():
        samples = model.predict(image, samples, rescale=False)
    return [sample.pred_instances for sample in samples]


def assert_detections(outputs, predicted, strays=0, at_least=10):
    """Dets and labels hold what was predicted, best first, and nothing else.

    Args:
        strays: Detections of an image that may differ: other kernels round otherwise,
            and two boxes may overlap by just the threshold of NMS.
    """
    assert len(outputs[0]) == len(outputs[1]) == len(predicted)
    for dets, labels, want in zip(*outputs[:2], predicted, strict=True):
        dets, labels = torch.as_tensor(dets), torch.as_tensor(labels)
        count = len(want)
        assert count >= at_least
        assert (labels[:count] >= 0).all() and (labels[count:] == -1).all()
        assert (dets[count:] == 0).all()
        scores = dets[:, 4]
        assert (scores[:-1] >= scores[1:]).all()
        # Two scores may change places where they differ in the last bit.
        same = labels[:count, None] == want.labels
        same &= (scores[:count, None] - want.scores).abs() < 1e-3
        # Boxes that are not clipped can be much larger than the image.
        boxes = dets[:count, None, :4], want.bboxes
        same &= torch.isclose(*boxes, atol=0.1, rtol=1e-4).all(-1)
        assert (~same.any(0)).sum() <= strays and (~same.any(1)).sum() <= strays


def onnx_file(graph, image, path):
    """The file that a graph is exported to, free in the number of images."""
    axes = {name: {0: 'images'} for name in ('image', *graph.outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            graph,
            (image,),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=['image'],
            output_names=list(graph.outputs),
            dynamic_axes=axes,
        )
    return path
