"""Attention heads as units: a toy worked out by hand, and models of MMPretrain."""

import numpy as np
import pytest
import torch
from support.configs import classifier
from support.pruning import importance_of, iterate, prepared
from support.reference import mask_fisher
from support.roundtrip import assert_prunes, pruned_model, traced
from support.toys import Net, grouped, reasons_of, toy_forward, toy_loss, widths
from torch import nn
from torch.nn import functional as F

from mmgfp.discovery.verified import DISAGREES
from mmgfp.discovery.verify import disagreement, masked_and_compact
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.tracing import ATTENTION_SPECS, AttentionSpec

HEADS, WIDTH = 4, 2


class Attention(nn.Module):
    """Attention of `HEADS` heads of `WIDTH` channels over inputs (N, L, 3)."""

    def __init__(self, attend, heads=HEADS, **parts):
        super().__init__()
        self.attend = attend
        self.num_heads, self.head_dims, self.embed_dims = heads, WIDTH, heads * WIDTH
        self.qkv = nn.Linear(3, 3 * self.embed_dims)
        self.proj = nn.Linear(self.embed_dims, 5)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        shape = (*x.shape[:2], 3, self.num_heads, WIDTH)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        x = self.attend(self, q, k, v).transpose(1, 2)
        return self.proj(x.reshape(*x.shape[:2], self.embed_dims))


class ShapeBoundAttention(Attention):
    """Its attributes look like those of a module that copes; its code does not."""

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        x = fused(self, *qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)
        return self.proj(x.reshape(*x.shape[:2], HEADS * WIDTH))


class UncountedAttention(Attention):
    """Has no ``embed_dims``."""

    def __init__(self):
        super().__init__(None)
        del self.embed_dims

    forward = ShapeBoundAttention.forward


def fused(net, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def plain(net, q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def scaled(net, q, k, v):
    return (q @ k.transpose(-2, -1) * net.scale).softmax(-1) @ v


def biased(net, q, k, v):
    bias = net.table[net.index.view(-1)].view(64, 64, -1).permute(2, 0, 1)
    return (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


def fused_biased(net, q, k, v):
    bias = net.biases[:, net.index].unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, bias)


def across_channels(net, q, k, v):
    return (q.transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)


def distances():
    """How far apart two of 64 positions lie, (64, 64)."""
    return (torch.arange(64)[:, None] - torch.arange(64)).abs()


def net_of(make, *args, **options):
    """The attention on the 64 pixels of an image (N, 3, 8, 8)."""
    torch.manual_seed(0)
    attn = make(*args, **options)
    return Net(lambda net, x: net.attn(x.flatten(2).mT), attn=attn)


@pytest.mark.parametrize(
    ('attend', 'parts', 'also'),
    [
        (fused, {}, {}),
        (plain, {}, {}),
        (scaled, {'scale': (HEADS, 1, 1)}, {('attn.scale', 0): 1}),
        (biased, {'table': (64, HEADS)}, {('attn.table', 1): 1}),
        (fused_biased, {'biases': (HEADS, 64)}, {('attn.biases', 0): 1}),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_a_head_is_a_unit(attend, parts, also):
    tensors = {name: nn.Parameter(torch.rand(shape)) for name, shape in parts.items()}
    net = net_of(Attention, attend, index=distances(), **tensors)
    (group,) = grouped(net).groups
    assert group.units == HEADS
    assert widths(group) == also | {
        ('attn.qkv.weight', 0): 3 * WIDTH,
        ('attn.qkv.bias', 0): 3 * WIDTH,
        ('attn.proj.weight', 1): WIDTH,
    }
    rows = {(m.name, m.role): m.index.tolist() for m in group.members}
    # q, k and v are 8 rows each; a head has two of each.
    assert rows['attn.qkv.weight', 'out'][1] == [2, 3, 10, 11, 18, 19]
    assert rows['attn.proj.weight', 'in'] == [[0, 1], [2, 3], [4, 5], [6, 7]]

    kept = np.array([True, False, True, True])
    assert disagreement(net, [group], kept, toy_forward) is None
    _, small = masked_and_compact(net, [group], kept)
    assert (small.attn.num_heads, small.attn.embed_dims) == (3, 6)
    assert small.attn.qkv.weight.shape == (18, 3)


def test_contracting_positions_leaves_heads_apart():
    (group,) = grouped(net_of(Attention, lambda *a: across_channels(*a).mT)).groups
    assert (group.units, group.members[0].width) == (HEADS, 3 * WIDTH)


def test_a_single_head_stays():
    grouping = grouped(net_of(Attention, plain, heads=1))
    assert grouping.groups == ()
    assert reasons_of(grouping)['attn.qkv'] == 'multiplied with an activation by Bmm'


def test_heads_of_an_unknown_module_stay():
    grouping = grouped(net_of(UncountedAttention))
    assert grouping.groups == ()
    assert reasons_of(grouping)['attn.qkv'] == (
        'in attention heads of UncountedAttention, which has no AttentionSpec, '
        'multiplied with an activation by ScaledDotProductFlashAttentionForCpu'
    )


def test_a_spec_can_be_added(monkeypatch):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.size = HEADS, WIDTH
            self.to_qkv, self.proj = nn.Linear(3, 24), nn.Linear(8, 5)

        def forward(self, x):
            qkv = self.to_qkv(x).unflatten(2, (3, self.num_heads, self.size))
            x = fused(self, *qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)
            return self.proj(x.flatten(2))

    assert grouped(net_of(Renamed)).groups == ()
    specs = [
        *ATTENTION_SPECS,
        AttentionSpec(('to_qkv', 'proj'), 'size', ('num_heads',)),
    ]
    monkeypatch.setattr('mmgfp.tracing.attention.ATTENTION_SPECS', specs)
    net = net_of(Renamed)
    (group,) = grouped(net).groups
    assert group.units == HEADS
    assert disagreement(net, [group], np.arange(HEADS) != 2, toy_forward) is None


def test_code_that_does_not_cope_is_found_by_verification():
    torch.manual_seed(0)
    parts = {'good': Attention(fused), 'bad': ShapeBoundAttention(fused)}
    parts['mlp'] = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    net = Net(lambda net, x: net.bad(net.mlp(net.good(x.flatten(2).mT))), **parts)
    grouping = prepared(net, forward=toy_forward).units.grouping
    found = [g.name for g in grouping.groups]
    assert 'good.qkv' in found and 'mlp.0' in found and 'bad.qkv' not in found
    assert DISAGREES in reasons_of(grouping)['bad.qkv']


@pytest.mark.parametrize('attend', [fused, plain])
def test_fisher_information_of_heads(attend):
    """A head's mask lies on the inputs of ``proj``, all channels of it together."""
    net = net_of(Attention, attend).double()
    pruner = prepared(net)
    iterate(pruner)
    pruner.close()
    expected = mask_fisher(net, toy_loss, pruner.units.grouping.groups, 2).numpy()
    assert len(expected) == HEADS and (expected > 0).all()
    assert importance_of(pruner) == pytest.approx(expected, rel=1e-5, abs=0)


ARCH = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=40)
VIT = dict(type='VisionTransformer', arch=ARCH, img_size=32, patch_size=8)


def vit(backbone):
    cfg = classifier(backbone, 24)
    cfg.model.pop('neck')
    cfg.model.backbone.out_type = 'cls_token'
    return cfg


@pytest.mark.parametrize('kind', ['VisionTransformer', 'ViTEVA02'])
def test_heads_of_transformers(kind, tmp_path):
    found = traced(vit(VIT | dict(type=kind)), 32)
    assert len(found.model.backbone.layers) == 2
    layers = (f'backbone.layers.{i}.attn.qkv' for i in range(2))
    assert [found.units(layer) for layer in layers] == [3, 3]
    assert_prunes(found, tmp_path)


def test_a_config_rebuilds_the_counts_of_heads(tmp_path):
    found = traced(vit(VIT), 32)
    groups = found.grouping.groups
    kept = np.concatenate([np.arange(g.units) > 0 for g in groups])
    file = tmp_path / 'structure.json'
    PruneStructure.of(groups, kept, shapes_of(found.model)).save(file)
    for layer in pruned_model(found.cfg.model, file).backbone.layers:
        attn = layer.attn
        assert (attn.num_heads, attn.head_dims, attn.embed_dims) == (2, 8, 16)
        assert attn.qkv.weight.shape == (48, 24)
        assert (attn.proj.in_features, attn.proj.out_features) == (16, 24)


UNCOUNTED = {
    'BEiTAttention': (VIT | dict(type='BEiTViT'), 24, 'backbone.layers.0.attn.qkv'),
    'WindowMSA': (
        dict(
            type='SwinTransformer',
            arch=dict(embed_dims=24, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2]),
            img_size=64,
            stage_cfgs=dict(block_cfgs=dict(window_size=2)),
        ),
        192,
        'backbone.stages.0.blocks.0.attn.w_msa.qkv',
    ),
}


@pytest.mark.parametrize('module', UNCOUNTED)
def test_heads_stay_where_code_reads_the_width_off_its_input(module):
    backbone, channels, layer = UNCOUNTED[module]
    cfg = classifier(backbone, channels)
    if module == 'BEiTAttention':
        cfg.model.pop('neck')
    found = traced(cfg, 64 if module == 'WindowMSA' else 32)
    assert f'heads of {module}, which has no AttentionSpec' in found.reason(layer)


@pytest.mark.parametrize('eager', [True, False])
def test_biases_that_levit_keeps_ready_follow(eager):
    """It computes ``ab`` when it is switched to inference."""
    from mmpretrain.models.backbones.levit import Attention as LeViTAttention

    options = dict(key_dim=2, num_heads=4, attn_ratio=2, resolution=8)
    net = net_of(LeViTAttention, 3, **options)
    nn.init.normal_(net.attn.attention_biases)
    (group,) = grouped(net).groups
    assert group.units == 4
    net.train(not eager)
    masked, small = masked_and_compact(net, [group], np.arange(4) != 1)
    assert (small.attn.num_heads, small.attn.dh, small.attn.nh_kd) == (3, 12, 6)
    if not eager:
        masked.eval(), small.eval()
    with torch.no_grad():
        torch.testing.assert_close(toy_forward(masked), toy_forward(small))
