"""Whole runs on a device, to be compared with the same run on the CPU."""

from __future__ import annotations

import io
from contextlib import nullcontext

import numpy as np
import torch
from mmcv.ops import roi_align
from torch import nn

from mmgfp import ChannelPruner
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from support import toys
from support.configs import FASTER, MASK, classifier, slim, slim_retinanet
from support.toys import Net, conv, images, square_loss


def seeded(build):
    torch.manual_seed(0)
    return build()


def two_stages(n, x):
    """Images read by one head, and through RoIs of both images by another one."""
    x = n.b(n.a(x).relu()).relu()
    corners = [[0, 1, 1, 5, 5], [1, 0, 0, 7, 7], [0, 2, 2, 6, 6]]
    rois = roi_align(x, x.new_tensor(corners), 2)
    index = torch.tensor([2, 0, 1], device=x.device)
    return n.head(x), n.fc(rois[index].flatten(1).relu())


def frames(n, x):
    """Rows in the order of images: each is seen as two frames, side by side."""
    return n.head(n.b(n.a(x.repeat_interleave(2, 0)).relu()).relu())


def views(n, x):
    """The images over and over again."""
    return n.head(n.b(n.a(torch.cat([x, x.flip(3)])).relu()).relu())


def parts(n, x):
    """An image in each call."""
    return tuple(n.head(n.b(n.a(x[i : i + 1]).relu()).relu()) for i in range(len(x)))


def net(run):
    def build():
        layers = dict(a=conv(3, 6), b=conv(6, 8), head=conv(8, 2), fc=nn.Linear(32, 3))
        if run is not two_stages:
            del layers['fc']
        return Net(run, **layers)

    return build


class Buffered(nn.Module):
    """Frozen norms by hand, whose buffers are in the graph as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 6), conv(6, 2)
        self.register_buffer('scale', torch.rand(6) + 0.5)

    def forward(self, x):
        return self.head((self.a(x) * self.scale.reshape(1, -1, 1, 1)).relu())


class Attention(nn.Module):
    """Tokens, attention and a norm over channels between fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = conv(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 200), nn.Linear(200, 2)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc2(self.fc1(self.norm(x)).relu())


MODELS = {
    'BN and a residual': toys.ResidualPair,
    'grouped': toys.GroupConv,
    'shuffled': toys.Shuffle,
    'flattened': toys.FlattenLinear,
    'transposed': toys.Transposed,
    'detector': toys.TinyDetector,
    'buffers': Buffered,
    'attention': Attention,
    'RoIs': net(two_stages),
    'frames': net(frames),
    'views': net(views),
    'parts': net(parts),
}


CRITERIA = [
    'taylor',
    dict(type='taylor', of='weights'),
    'l1',
    'l2',
    'fpgm',
    dict(type='bn_scale', sparsity=1e-3),
    'lamp',
    'activation',
    dict(type='activation', of='apoz'),
    'random',
]


def pruner_of(model, criterion):
    options = dict(interval=2, units_per_step=2, target=dict(flops=0.3))
    return ChannelPruner(model, criterion=criterion, **options)


def train(pruner, optimizer, loss, iterations):
    for _ in range(iterations):
        optimizer.zero_grad()
        loss(pruner.model).backward()
        optimizer.step()
        pruner.step()


def run(build, device, default=nullcontext, criterion='fisher'):
    """Prune, cut, save, resume and go on; return the pruner and the compact model.

    Models and images are made outside of the context that ``default`` returns.
    """
    x = images().to(device)

    def forward(m):
        return m(x)

    def loss(m):
        return square_loss(m(x))

    def optimizer_of(model):
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    first, resumed = (pruner_of(seeded(build).to(device), criterion) for _ in range(2))
    file = io.BytesIO()
    with default():
        optimizer = optimizer_of(first.model)
        first.prepare(loss, forward, len(x))
        train(first, optimizer, loss, 3)
        first.compact_([optimizer])
        train(first, optimizer, loss, 2)
        weights = {n: t.cpu() for n, t in first.model.state_dict().items()}
        torch.save([first.state_dict(), weights], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    with default():
        optimizer = optimizer_of(resumed.model)
        resumed.load_state_dict(state, [optimizer])
        resumed.model.load_state_dict(weights)
        train(resumed, optimizer, loss, 3)
        return resumed, resumed.compact()


def assert_same_run(found, expected, **tolerance):
    """Equal groups and units; weights that are equal but for rounding."""
    pruner, small = found
    reference, reference_small = expected
    kept = reference.units.kept
    assert not kept.all()
    assert np.array_equal(pruner.units.kept, kept)
    names = [[g.name for g in p.units.grouping.groups] for p in (pruner, reference)]
    assert names[0] == names[1]
    assert pruner.discovery.rows == reference.discovery.rows
    assert not getattr(pruner.criterion, 'warned', None)
    tensors = {n: t.cpu() for n, t in small.state_dict().items()}
    torch.testing.assert_close(tensors, dict(reference_small.state_dict()), **tolerance)


def batch_calls(config):
    def build(device):
        model = build_model(config).to(device)
        return model, BatchCalls(model, demo_batch(config, 2, (64, 64)))

    return build


DETECTORS = {
    'RetinaNet': lambda: slim_retinanet,
    'Faster R-CNN': lambda: batch_calls(slim(FASTER)),
    'Mask R-CNN': lambda: batch_calls(slim(MASK)),
    'classifier': lambda: batch_calls(
        classifier(dict(type='ResNet', depth=18, base_channels=8), 64)
    ),
}


def prune(build, device):
    """Prune a model of OpenMMLab and cut it; return its pruner."""
    model, calls = seeded(lambda: build(device))
    pruner = ChannelPruner(model, interval=2, units_per_step=20, target=dict(flops=0.3))
    pruner.prepare(calls.loss, calls.forward, images=2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for iteration in range(4):
        torch.manual_seed(iteration)  # a sampler of RoIs draws
        train(pruner, optimizer, calls.loss, 1)
        if iteration == 1:
            pruner.compact_([optimizer])
    return pruner
