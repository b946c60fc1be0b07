"""Deformable convolutions of mmcv and torchvision: costs, masks, coupled channels."""

import mmcv.ops
import numpy as np
import pytest
import torch
import torchvision
from support.pruning import importance_of, iterate, prepared
from support.reference import mask_fisher
from support.toys import Net, conv, grouped, images, toy_loss, widths
from torch.utils.checkpoint import checkpoint

from mmgfp.apps.analysis import coverage
from mmgfp.discovery.profile import profile_layers
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import disagreement
from mmgfp.selection.costs import CostTable
from mmgfp.utils.layers import is_layer

PACKS = {
    False: (mmcv.ops.DeformConv2dPack, mmcv.ops.DeformConv2d),
    True: (mmcv.ops.ModulatedDeformConv2dPack, mmcv.ops.ModulatedDeformConv2d),
}
CASES = [(modulated, parts) for modulated in (False, True) for parts in (1, 2)]


def packed(modulated, parts=1):
    """stem, a pack that makes its own offsets, head: channels 6, 6 and 4."""
    torch.manual_seed(0)
    options = dict(padding=1, bias=False, deform_groups=parts)
    net = Net(
        lambda n, x: n.head(n.dcn(n.stem(x)).relu()),
        stem=conv(3, 6),
        dcn=PACKS[modulated][0](6, 6, 3, **options),
        head=conv(6, 4),
    )
    torch.nn.init.normal_(net.dcn.conv_offset.weight, std=0.1)
    return net.double()


def unpacked(net, modulated, parts=1):
    """The same network with the offsets' convolution beside the deformable one."""

    def run(n, x):
        x = n.stem(x)
        moved = n.offset(x)
        if modulated:
            first, second, mask = moved.chunk(3, 1)
            moved = torch.cat((first, second), 1), mask.sigmoid()
        else:
            moved = (moved,)
        return n.head(n.dcn(x, *moved).relu())

    options = dict(padding=1, bias=False, deform_groups=parts)
    dcn = PACKS[modulated][1](6, 6, 3, **options).double()
    dcn.weight.data = net.dcn.weight.data
    return Net(run, stem=net.stem, dcn=dcn, offset=net.dcn.conv_offset, head=net.head)


def vision(modulated, parts=1, groups=1):
    """The same with torchvision's module, whose offsets always come from outside."""

    def run(n, x):
        x = n.stem(x)
        moved = n.offset(x)
        mask = moved[:, : 9 * parts].sigmoid() if modulated else None
        return n.head(n.dcn(x, moved, mask).relu())

    torch.manual_seed(0)
    return Net(
        run,
        stem=conv(3, 6),
        offset=conv(6, 18 * parts),
        dcn=torchvision.ops.DeformConv2d(6, 6, 3, padding=1, groups=groups),
        head=conv(6, 4),
    ).double()


@pytest.mark.parametrize('modulated, parts', CASES)
def test_offsets_read_a_mask_copy_of_their_own(modulated, parts):
    """The pack hands its input on to its offsets, which count once, not twice."""
    model = packed(modulated, parts)
    pruner = prepared(model, strict=True)
    iterate(pruner)
    pruner.close()
    other = unpacked(model, modulated, parts)
    groups = prepared(other, strict=True).units.grouping.groups
    expected = mask_fisher(other, toy_loss, groups, 2)
    assert expected.count_nonzero() == len(expected) == 6 // parts + 6
    assert importance_of(pruner) == pytest.approx(expected.numpy(), rel=1e-6, abs=0)


@pytest.mark.parametrize('again', [True, False])
def test_pack_in_a_checkpointed_part(again):
    """Whether backward runs the part again at once, or when it needs a tensor."""
    expected, model = packed(True), packed(True)
    model.run = lambda n, x: n.head(
        checkpoint(lambda y: n.dcn(y).relu(), n.stem(x), use_reentrant=again)
    )
    sums = []
    for net in (expected, model):
        pruner = prepared(net, strict=True)
        toy_loss(net).backward()
        sums.append(pruner.criterion.tap.take())
    assert set(sums[0]) == set(sums[1])
    for name, gradient in sums[0].items():
        torch.testing.assert_close(sums[1][name], gradient, rtol=1e-6, atol=0)


def test_tap_inside_a_pack_changes_no_gradient():
    plain, model = packed(True), packed(True)
    prepared(model, strict=True)
    for net in (plain, model):
        toy_loss(net).backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('modulated, parts', CASES)
@pytest.mark.parametrize('build', [packed, vision])
def test_channels(build, modulated, parts):
    """Stem's channels keep their share of each part; the offsets stay as they are."""
    model = build(modulated, parts)
    offset = 'dcn.conv_offset' if build is packed else 'offset'
    pruner = prepared(model, strict=True)
    grouping, profiles = pruner.units.grouping, profile_layers(model, toy_loss, 2)
    stem, dcn = grouping.groups
    assert (stem.units, dcn.units) == (6 // parts, 6)
    entries = {('stem.weight', 0), ('stem.bias', 0), (f'{offset}.weight', 1)}
    assert widths(stem) == dict.fromkeys([*entries, ('dcn.weight', 1)], parts)
    assert [f.layer for f in grouping.frozen] == [offset, 'head']
    assert 'offsets' in grouping.frozen[0].reason
    assert coverage(model, grouping, profiles)['macs'] == 1
    pruner.close()
    kept = random_units((stem, dcn), 0.3, np.random.default_rng(0))
    assert disagreement(model, (stem, dcn), kept, lambda m: m(images())) is None


def test_conv_groups_of_torchvision():
    """They are told from the shapes of input and weight: 3 units, 2 channels each."""
    model = vision(True, groups=3)
    (group,) = grouped(model).groups
    assert group.units == 3
    assert set(widths(group).values()) == {2}
    kept = np.array([True, False, True])
    assert disagreement(model, [group], kept, lambda m: m(images())) is None


@pytest.mark.parametrize('modulated', [False, True])
def test_costs(modulated):
    """stem 6·27, dcn 6·54, head 4·54 weights, and 18 or 27 · 54 for the offsets."""
    model = packed(modulated)
    assert is_layer(model.dcn)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    profiles = profile_layers(model, toy_loss, 2)
    totals = CostTable(shapes, profiles, ()).totals(np.zeros(0))
    offsets = 27 if modulated else 18
    assert totals['macs'] == (162 + 324 + 216 + offsets * 54) * 64
    assert totals['memory'] == (6 + 6 + 4 + offsets) * 64
