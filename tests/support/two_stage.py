"""Small two-stage detectors, and the RoIs that they look at."""

import torch
from torch import nn

from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from support.configs import slim


def small_two_stage(name):
    """The config's slim model with RoIs of 2 x 2, and three batches."""
    cfg = slim(name)
    head = cfg.model.roi_head
    heads = head.bbox_head if isinstance(head.bbox_head, list) else [head.bbox_head]
    head.bbox_roi_extractor.roi_layer.output_size = 2
    for one in heads:
        one.roi_feat_size = 2
    torch.manual_seed(0)
    model = build_model(cfg)
    batches = []
    for seed in range(3):
        torch.manual_seed(seed)
        batches.append(demo_batch(cfg, 2, (64, 64)))
    return model, batches


def rois_of(model, call):
    """The RoIs that each call of a box or mask extractor reads."""
    seen = []
    head = model.roi_head
    names = [n for n, _ in head.named_modules() if n.endswith('roi_extractor')]
    extractors = [head.get_submodule(n) for n in names]
    flat = [m for e in extractors for m in (e if isinstance(e, nn.ModuleList) else [e])]
    handles = [
        m.register_forward_pre_hook(lambda m, args: seen.append(args[1].clone()))
        for m in flat
    ]
    call(model)
    for handle in handles:
        handle.remove()
    return seen
