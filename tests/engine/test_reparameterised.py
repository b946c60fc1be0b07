"""Blocks that fuse their branches after pruning compute what they did before."""

import copy

import mmdet.models  # noqa: F401
import mmpretrain.models
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from support.configs import classifier
from support.roundtrip import traced
from torch import nn

from mmgfp import PruneStructure, compact_
from mmgfp.discovery.comparing import difference
from mmgfp.discovery.unit_sets import random_units
from mmgfp.surgery.attributes import CONV_ATTRIBUTES
from mmgfp.surgery.structure import shapes_of

QUARTER = dict(num_blocks=[1, 2, 1, 1], width_factor=[0.25] * 4)
VGG = dict(QUARTER, group_layer_map=None, se_cfg=None)
ONE = dict(QUARTER, num_conv_branches=[2] * 4, num_se_blocks=[0, 0, 1, 1])
LARGE = dict(
    large_kernel_sizes=[7] * 4, layers=[1] * 4, channels=[16, 16, 32, 32],
    small_kernel=3, dw_ratio=1,
)  # fmt: skip
RIF = dict(layers=[1] * 4, embed_dims=[16] * 4, mlp_ratios=[2] * 4)
#: A backbone and the channels of its last stage.
CASES = {
    'repvgg': (dict(type='RepVGG', arch=VGG, base_channels=32), 64),
    'repvgg_grouped': (
        dict(
            type='RepVGG',
            arch=dict(VGG, group_layer_map={2: 2, 4: 2}),
            base_channels=64,
        ),
        128,
    ),
    'mobileone': (dict(type='MobileOne', arch=ONE), 128),
    'replknet': (dict(type='RepLKNet', arch=LARGE), 32),
    'riformer': (dict(type='RIFormer', arch=RIF), 16),
    'riformer_grouped': (
        dict(type='RIFormer', arch=RIF, norm_cfg=dict(type='GN', num_groups=4)),
        16,
    ),
    'levit': (dict(type='LeViT', arch='128s', img_size=64, out_indices=(2,)), 384),
}
#: Their blocks keep all channels, as they are reshaped to a fixed number of them.
LEFT_ALONE = {'RepMLPNet'}


def test_every_backbone_that_fuses_its_branches_is_tried():
    classes = {c for r in (MODELS, mmpretrain.registry.MODELS, mmdet.registry.MODELS)
               for c in r.module_dict.values()}  # fmt: skip
    backbones = {c.__name__ for c in classes if 'backbones' in c.__module__}
    fusing = {c.__name__ for c in classes if hasattr(c, 'switch_to_deploy')}
    tried = {backbone['type'] for backbone, _ in CASES.values()}
    assert fusing & backbones == tried | LEFT_ALONE


@pytest.mark.parametrize('name', CASES)
def test_fused_equals_compact(name):
    backbone, channels = copy.deepcopy(CASES[name])
    found = traced(
        classifier({'out_indices': (3,), **backbone}, channels), 64, strict=False
    )
    groups = found.grouping.groups
    kept = random_units(groups, 0.4, np.random.default_rng(0))
    structure = PruneStructure.of(groups, kept, shapes_of(found.model))
    assert structure.kept
    small = compact_(found.model, structure).double().eval()
    randomise(small)
    for module in small.modules():
        if hasattr(module, 'switch_to_deploy') and hasattr(module, 'branch_norm'):
            branch = next(m for m in module.modules() if isinstance(m, nn.Sequential))
            expected = [getattr(branch.conv, a) for a in CONV_ATTRIBUTES]
            assert [getattr(module, a) for a in CONV_ATTRIBUTES] == expected
    image = torch.rand(2, 3, 64, 64, dtype=torch.double)
    layers = sum(1 for _ in small.modules())
    with torch.no_grad():
        before = small(image, mode='tensor')
        small.backbone.switch_to_deploy()
        small.double()  # what is new in some blocks is in single precision
        after = small(image, mode='tensor')
    assert sum(1 for _ in small.modules()) < layers
    assert difference(before, after) < 1e-9


def randomise(model):
    """Give norms statistics and weights other than 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 * name.endswith(('var', 'weight')))
