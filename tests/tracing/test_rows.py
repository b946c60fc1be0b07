"""Which image each row belongs to, after ops that keep, move, pick or mix rows."""

import pytest
import torch
from mmcv.ops import RoIPool, roi_align
from support.pruning import importance_of, iterate, prepared, seen_by
from torch import nn

from mmgfp.criteria.tap import MaskGradientTap
from mmgfp.tracing import judge_rows, watch_rows
from mmgfp.tracing.row_values import Lost, Rows
from mmgfp.tracing.rows import rows_of

IMAGES = 3
ROIS = torch.tensor([2.0, 0, 0, 1])  # the images of four RoIs


@pytest.fixture
def x():
    """What a convolution makes of three images, (3, 4, 2, 2)."""
    torch.manual_seed(0)
    return nn.Conv2d(1, 4, 1)(torch.rand(IMAGES, 1, 2, 2))


@pytest.fixture
def pooled(x):
    """Features of four RoIs, (4, 4, 1, 1)."""
    return roi_align(x, boxes(ROIS), 1)


def boxes(image_of):
    """RoIs (R, 5) that lie in these images."""
    whole = torch.tensor([0.0, 0, 2, 2]).expand(len(image_of), 4)
    return torch.cat([image_of[:, None], whole], 1)


def images_of(tensor):
    """The image of each row, as a list."""
    rows = rows_of(tensor)
    assert isinstance(rows, Rows), rows.reason
    assert rows.images == IMAGES
    found = list(range(rows.images)) if rows.index is None else rows.index.tolist()
    assert len(found) == len(tensor)
    return found


def assign(base, chosen, values):
    """``base`` with the rows ``chosen`` overwritten."""
    base = base.clone()
    base[torch.tensor(chosen)] = values
    return base


def zeros(rows):
    return torch.zeros(rows, 4, 2, 2)


KEPT = {
    'itself': lambda x: x,
    'relu': lambda x: x.relu(),
    'norm': lambda x: nn.BatchNorm2d(4)(x),
    'conv': lambda x: nn.Conv2d(4, 5, 1)(x),
    'linear': lambda x: nn.Linear(16, 3)(x.flatten(1)),
    'linear without bias': lambda x: nn.Linear(16, 3, bias=False)(x.flatten(1)),
    'linear on tokens': lambda x: nn.Linear(4, 3)(x.flatten(2).transpose(1, 2)),
    'parameter': lambda x: x * nn.Parameter(torch.ones(4, 1, 1)),
    'parameter as wide': lambda x: x * nn.Parameter(torch.ones(3, 1, 1, 1)),
    'residual': lambda x: x + nn.Conv2d(4, 4, 1)(x),
    'joined channels': lambda x: torch.cat([x, x], 1),
    'picked channels': lambda x: x[:, [0, 2]],
    'sliced channels': lambda x: x[:, 1:3],
    'split channels': lambda x: x.split(2, 1)[1],
    'flipped columns': lambda x: x.flip(-1),
    'pooled globally': lambda x: x.mean((2, 3)),
    'sum of all, times 0': lambda x: x + x.sum() * 0,
    'normalised by the batch': lambda x: x - x.mean(0),
    'permuted behind': lambda x: x.permute(0, 2, 3, 1),
    'swapped and back': lambda x: x.reshape(3, 2, 8).transpose(1, 2).flatten(1),
    'set aside and back': lambda x: x.permute(1, 2, 0, 3)[0].transpose(0, 1),
    'parts told apart': lambda x: x.permute(1, 0, 2, 3)[1],
    'parts unbound': lambda x: x.permute(2, 3, 0, 1).unbind(0)[1].unbind(0)[0],
    'used aside': lambda x: x.transpose(0, 1).relu()[0],
    'reduced beside': lambda x: x.transpose(0, 1).mean(0),
    'instance norm': lambda x: nn.InstanceNorm2d(4, affine=True)(x),
    'pooled in channels_last': lambda x: nn.AdaptiveAvgPool2d(1)(
        x.contiguous(memory_format=torch.channels_last)
    ),
    'sequence first': lambda x: (lambda s: nn.LayerNorm(4)(s + nn.Linear(4, 4)(s)))(
        x.flatten(2).permute(2, 0, 1)
    ).transpose(0, 1),
    'attention': lambda x: nn.MultiheadAttention(4, 2)(
        *[x.flatten(2).permute(2, 0, 1)] * 3, need_weights=False
    )[0].mean(0),
    'there and back': lambda x: x.reshape(6, 2, 2, 2).reshape(3, 4, 2, 2),
}


@pytest.mark.parametrize('op', KEPT.values(), ids=KEPT)
def test_rows_that_stay(x, op):
    assert images_of(op(x)) == [0, 1, 2]


#: Two channels of the first image and two others of the last, (3, 4).
CHOSEN = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()

MOVED = {
    'windows': (lambda x: x.reshape(6, 2, 2, 2), [0, 0, 1, 1, 2, 2]),
    'tokens': (lambda x: x.reshape(12, 4), [0] * 4 + [1] * 4 + [2] * 4),
    'picked': (lambda x: x[torch.tensor([2, 0, 2])], [2, 0, 2]),
    'masked': (lambda x: x[torch.tensor([True, False, True])], [0, 2]),
    'masked by bytes': (lambda x: x[ROIS[:3].to(torch.uint8)], [0]),
    'masked with channels': (lambda x: x[CHOSEN], [0, 0, 2, 2]),
    'masked as many of each': (lambda x: x[CHOSEN].reshape(2, 2, 2, 2), [0, 2]),
    'picked with channels': (lambda x: x[[2, 0], [1, 1]], [2, 0]),
    'index_select': (lambda x: x.index_select(0, torch.tensor([1, 1])), [1, 1]),
    'sliced': (lambda x: x[1:], [1, 2]),
    'sliced from behind': (lambda x: x[-2:], [1, 2]),
    'sliced in steps': (lambda x: x[::2], [0, 2]),
    'split': (lambda x: x.split([1, 2])[1], [1, 2]),
    'chunked': (lambda x: x.chunk(3)[2], [2]),
    'flipped': (lambda x: x.flip(0), [2, 1, 0]),
    'repeated': (lambda x: x.repeat(2, 1, 1, 1), [0, 1, 2, 0, 1, 2]),
    'concatenated': (lambda x: torch.cat([x, x[:1]]), [0, 1, 2, 0]),
    'overwritten': (lambda x: assign(x, [0, 1], x[[2, 2]]), [2, 2, 2]),
    'written into zeros': (lambda x: assign(zeros(4), [3, 0, 2], x), [1, -1, 2, 0]),
    'one row written into zeros': (lambda x: assign(zeros(2), [1], x[1:2]), [-1, 1]),
    'one image': (lambda x: x[1], [1] * 4),
    'one image in a batch': (lambda x: x[-1][None], [2]),
    'image by image': (lambda x: torch.cat([i[None] for i in x.flip(0)]), [2, 1, 0]),
    'points of one image': (lambda x: x[1].flatten(1).t(), [1] * 4),
    'stacked': (lambda x: torch.stack([x[2], x[0]]), [2, 0]),
    'RoIs': (lambda x: roi_align(x, boxes(ROIS), 1), [2, 0, 0, 1]),
    'RoIs by RoIPool': (lambda x: RoIPool(1)(x, boxes(ROIS)), [2, 0, 0, 1]),
    'RoIs of picked': (lambda x: roi_align(x[[1, 1, 0]], boxes(ROIS), 1), [0, 1, 1, 1]),
}


@pytest.mark.parametrize('op, expected', MOVED.values(), ids=MOVED)
def test_rows_that_move(x, op, expected):
    if op is MOVED['RoIs by RoIPool'][0] and not torch.cuda.is_available():
        pytest.skip('mmcv has no RoIPool for the CPU')
    assert images_of(op(x)) == expected


def test_rows_follow_rois(pooled):
    assert images_of(nn.Linear(4, 2)(pooled.flatten(1)).relu()) == [2, 0, 0, 1]
    assert images_of(pooled[torch.tensor([3, 1])]) == [1, 0]
    assert rows_of(pooled[:2]).pooled


LOST = {
    'transposed': (lambda x: x.transpose(0, 1), 'moved by Transpose'),
    'permuted': (lambda x: x.permute(1, 0, 2, 3), 'moved by Permute'),
    'picked aside': (lambda x: x.permute(1, 0, 2, 3)[:, 0], 'moved by Permute'),
    'used aside': (lambda x: x.transpose(0, 1).cumsum(1)[0], 'moved by Transpose'),
    'two orders aside': (
        lambda x: (x.transpose(0, 1) + x.flip(0).transpose(0, 1))[0],
        'moved by Transpose',
    ),
    'normalised aside': (
        lambda x: nn.LayerNorm((3, 2, 2))(x.transpose(0, 1))[0],
        'moved by Transpose',
    ),
    'sheared': (lambda x: x.as_strided(x.shape, x.stride()), 'moved by AsStrided'),
    'rotated': (lambda x: x.rot90(1, (0, 1)), 'moved by Rot90'),
    'diagonal': (lambda x: x.diagonal(), 'moved by Diagonal'),
    'matrix': (lambda x: x[..., 0, 0].t(), 'moved by T'),
    'joined': (lambda x: x.reshape(1, 12, 2, 2), 'several images are joined by View'),
    'sorted': (lambda x: x.sort(0)[0], 'moved by Sort'),
    'gathered': (lambda x: x.gather(0, torch.zeros_like(x).long()), 'by Gather'),
    'rolled': (lambda x: x.roll(1, 0), 'moved by Roll'),
    'stacked batches': (lambda x: torch.stack([x, x]), 'joined by Stack'),
    'with a constant': (lambda x: torch.cat([x, torch.ones_like(x)]), 'by Cat'),
    'two orders': (lambda x: x + x.flip(0), 'combined by Add'),
    'reduced': (lambda x: x.sum(0), 'no image'),
    'only a parameter': (lambda x: nn.Parameter(x.detach()) * 2, 'no image'),
}


@pytest.mark.parametrize('op, reason', LOST.values(), ids=LOST)
def test_rows_that_are_lost(x, op, reason):
    found = rows_of(op(x))
    assert isinstance(found, Lost) and reason in found.reason


def test_pooling_that_hides_its_rois_is_lost(x):
    features = roi_align_of_torchvision(x, boxes(ROIS[:3]))  # as many as images
    assert 'does not show' in rows_of(features).reason


# -- in a network ------------------------------------------------------------


class TwoStage(nn.Module):
    """A convolution read by another one and, through RoIs, by a FC layer."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.a = nn.Conv2d(1, 2, 1, bias=False)
        self.b = nn.Conv2d(2, 1, 1, bias=False)
        self.fc = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        features = self.a(x)
        rois = self.pool(features, boxes(torch.tensor([0.0, 0, 1])).to(features))
        return self.b(features), self.fc(rois.flatten(1))


@pytest.fixture
def net():
    net = TwoStage(lambda x, rois: roi_align(x, rois, 1))
    net.a.weight.data[:] = torch.tensor([1.0, 2]).reshape(2, 1, 1, 1)
    net.b.weight.data[:] = torch.tensor([5.0, 1]).reshape(1, 2, 1, 1)
    net.fc.weight.data[:] = torch.tensor([3.0, -1])
    return net


#: Two images of 2 x 2 pixels, all 1 and all 2.
BATCH = torch.tensor([1.0, 2]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)


def total(net):
    return sum(o.sum() for o in net(BATCH))


def roi_align_of_torchvision(x, rois):
    torchvision = pytest.importorskip('torchvision')
    return torchvision.ops.roi_align(x, rois, 1)


def test_rois_of_an_image_are_summed_before_the_square(net):
    # The first image has two RoIs, the second one; a RoI reads what a pixel holds.
    # Unit 0 is (1, 2): b gives 5·1·4 = 20 and 5·2·4 = 40, the RoIs 2·3·1 = 6 and
    # 3·2 = 6: (20 + 6)² + (40 + 6)² = 2792.
    # Unit 1 is (2, 4): b gives 1·2·4 = 8 and 16, the RoIs 2·-1·2 = -4 and -1·4 = -4:
    # (8 - 4)² + (16 - 4)² = 160.
    pruner = prepared(net, total)
    iterate(pruner, total)
    assert importance_of(pruner).tolist() == pytest.approx([2792, 160])


class Sequences(nn.Module):
    """Two FC layers on sequences (N, L, C), which they read as (L, N, C) if told so."""

    def __init__(self, positions_first):
        super().__init__()
        self.positions_first = positions_first
        self.layers = nn.ModuleList(
            nn.Linear(i, o, bias=False) for i, o in ((1, 1), (1, 2), (2, 1))
        )
        weights = [1.0], [1.0, 2], [5.0, 1]
        for layer, values in zip(self.layers, weights, strict=True):
            layer.weight.data.view(-1)[:] = torch.tensor(values)

    def forward(self, x):
        x = self.layers[0](x)
        x = x.transpose(0, 1) if self.positions_first else x
        return self.layers[2](self.layers[1](x))


@pytest.mark.parametrize('positions_first', [False, True])
def test_sequences_are_summed_before_the_square(positions_first):
    x = BATCH.flatten(2).transpose(1, 2)  # (N, L, C)
    pruner = prepared(
        Sequences(positions_first), lambda m: m(x).sum(), target=dict(flops=0.7)
    )
    iterate(pruner, lambda m: m(x).sum())
    # At each of 4 positions unit 0 gives 5·1 and 5·2, unit 1 gives 1·2 and 1·4.
    assert importance_of(pruner).tolist() == [20**2 + 40**2, 8**2 + 16**2]


def test_what_reads_unknown_rows_is_frozen_with_the_reason(net):
    net.pool = roi_align_of_torchvision
    with pytest.raises(Exception, match='read by fc: its rows cannot be told to im'):
        prepared(net, total)


def test_rows_that_get_lost_later_are_said_and_not_counted(net, caplog):
    pruner = prepared(net, total)
    net.pool = roi_align_of_torchvision
    for _ in range(2):
        iterate(pruner, total)
    assert importance_of(pruner).tolist() == [0, 0] and seen_by(pruner).tolist() == [0]
    messages = [r.message for r in caplog.records if 'inputs of fc' in r.message]
    assert len(messages) == 1 and 'does not show which image' in messages[0]


def test_rois_of_frozen_features_are_not_taken_for_images(net):
    net.fc = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    pruner = prepared(net, total)
    net.a.requires_grad_(False)
    iterate(pruner, total)
    first, second = sorted(pruner.criterion.warned)
    assert 'inputs of b, fc.0 are not counted' in first
    assert 'needs no gradient, as behind frozen layers' in first
    assert 'inputs of fc.1 are not counted' in second
    assert 'needs no gradient' in second


def test_no_row_at_all_is_no_gradient(net):
    tap = MaskGradientTap({'fc': net.fc})
    tap.attach()
    features = net.a(BATCH)
    net.fc(roi_align(features, boxes(torch.zeros(0)), 1).flatten(1)).sum().backward()
    assert tap.take() == {} and tap.take_lost() == {}


def test_batches_of_different_size_in_one_iteration_are_said(net):
    tap = MaskGradientTap({'b': net.b, 'fc': net.fc})
    tap.attach()
    net.b(net.a(BATCH)).sum().backward()
    net.b(net.a(BATCH[:1])).sum().backward()
    reason = 'its rows cannot be told to images: 1 images where others saw 2'
    assert tap.take_lost() == {'b': reason}


def test_what_layers_read_is_summed_up(net):
    with watch_rows(net) as calls:
        net(BATCH)
    use = judge_rows(calls)
    assert use.called == {'a', 'b', 'fc'} and use.first == {'a'}
    assert use.images == {'a', 'b'} and use.rois == {'fc'} and not use.lost
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_calls_without_a_gradient_say_nothing_of_rows(net):
    """A sampler of PISA scores RoIs of one image at a time before they are chosen."""
    with watch_rows(net) as calls:
        net(BATCH)
        with torch.no_grad():
            net.fc(net.a(BATCH[:1]).mean((2, 3)).expand(5, -1))
    use = judge_rows(calls)
    assert use.rois == {'fc'} and not use.lost
