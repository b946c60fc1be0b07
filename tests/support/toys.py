"""Small networks with known couplings, and what traces any of them.

Each takes images (N, 3, H, W), as `images` makes them, and returns one tensor or a
tuple of tensors. The docstrings say which channels are coupled.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmgfp.discovery.grouping import build_groups
from mmgfp.groups import ChannelGroup, Grouping
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.tracing import Trace, trace_loss, watch_buffers
from mmgfp.utils.trial_runs import all_parameters_require_grad, undisturbed


def images(count: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    """Fixed random images (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)


def square_loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Sum over the outputs of their mean square, a scalar."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return sum(o.square().mean() for o in outputs)


def toy_forward(model: nn.Module, count: int = 2) -> Tensor | tuple[Tensor, ...]:
    """The outputs on `images` of the model's precision."""
    return model(images(count).to(next(model.parameters())))


def toy_loss(model: nn.Module, count: int = 2) -> Tensor:
    """The square loss on `images` of the model's precision."""
    return square_loss(toy_forward(model, count))


def traced(model: nn.Module, loss=toy_loss, strict: bool = False) -> Trace:
    """Trace ``loss(model)``."""
    with undisturbed(model), all_parameters_require_grad(model), watch_buffers(model):
        return trace_loss(model, loss(model), strict)


def grouped(model: nn.Module, loss=toy_loss, **options) -> Grouping:
    """Groups of a freshly traced model."""
    return build_groups(model, traced(model, loss), **options)


def widths(group: ChannelGroup) -> dict[tuple[str, int], int]:
    """How many entries of each (tensor, dimension) one unit takes."""
    return {(m.name, m.dim): m.width for m in group.members}


def reasons_of(grouping: Grouping) -> dict[str, str]:
    """Why layers keep channels, by layer."""
    return {f.layer: f.reason for f in grouping.frozen}


def structure_of(net: nn.Module, gone) -> PruneStructure:
    """The structure of ``net`` without the units ``gone``."""
    grouping = grouped(net)
    kept = ~np.isin(np.arange(grouping.units), gone)
    return PruneStructure.of(grouping.groups, kept, shapes_of(net))


def parameters_in(model: nn.Module) -> int:
    """The number of all elements of its parameters."""
    return sum(p.numel() for p in model.parameters())


def matrix(rows: list[list[float]], **options) -> nn.Conv2d:
    """A 1 x 1 convolution with the weights ``rows``, (C_out, C_in / groups)."""
    weight = torch.tensor(rows)[..., None, None]
    c_in = weight.shape[1] * options.get('groups', 1)
    layer = nn.Conv2d(c_in, len(weight), 1, bias=False, **options)
    layer.weight.data = weight
    return layer


def conv(c_in: int, c_out: int, kernel: int = 3, **options) -> nn.Conv2d:
    """A convolution that keeps H and W at stride 1."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Named layers and parameters, and a function of the net and x that runs them."""

    def __init__(self, run, **parts) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(self, x)


class ConvPair(nn.Module):
    """conv1, BN, ReLU, conv2. One group: 6 outputs of conv1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 6, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.conv1(x)).relu())


class ResidualPair(nn.Module):
    """A residual block. Groups: 6 outputs of stem and conv2; 5 outputs of conv1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.conv1 = conv(6, 5, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = conv(5, 6, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.bn1(self.conv1(x)).relu()
        return self.head((x + self.bn2(self.conv2(y))).relu())


class SharedHead(nn.Module):
    """One head on two levels.

    Groups: 6 outputs of stem; 8 outputs of level1 and level2, both read by tower;
    5 outputs of tower.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.level1 = conv(6, 8, 1)
        self.level2 = conv(6, 8, stride=2)
        self.tower = conv(8, 5)
        self.pred = conv(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x).relu()
        levels = self.level1(x), self.level2(x)
        return tuple(self.pred(self.tower(level).relu()) for level in levels)


class DepthWise(nn.Module):
    """An inverted residual's path. One group: 6 channels through expand and dw."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = conv(3, 6, 1)
        self.dw = conv(6, 6, groups=6, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.project = conv(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.bn(self.dw(F.relu6(self.expand(x))))))


class GroupConv(nn.Module):
    """A grouped conv. One group of 4 units: 2 inputs and 3 outputs of mid each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.mid = conv(8, 12, groups=4)
        self.head = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.stem(x).relu()).relu())


class Concat(nn.Module):
    """Two branches and the image, joined. Groups: 4 outputs of a; 6 outputs of b.

    The head reads the image at inputs 0 to 2, a at 3 to 6, b at 7 to 12.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 4)
        self.b = conv(3, 6, 1)
        self.head = conv(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.a(x).relu(), self.b(x).relu()], 1))


class Shuffle(nn.Module):
    """ShuffleNet's unit: split in halves, work on one, join, shuffle in 2 groups.

    One group of 4 units, since the halves must stay equally wide: unit j is outputs
    j and 4 + j of stem, input and output j of branch, inputs 2 j and 2 j + 1 of head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.branch = conv(4, 4)
        self.head = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([a, self.branch(b).relu()], 1)
        n, _, h, w = x.shape
        # -1 for the channels, so that the compact network can do it too.
        x = x.view(n, 2, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return self.head(x)


class GroupNormHead(nn.Module):
    """conv, GroupNorm of 4 norm groups, conv. One group of 4 units, 2 channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)
        self.gn = nn.GroupNorm(4, 8)
        self.pred = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pred(self.gn(self.conv(x)).relu())


class FlattenLinear(nn.Module):
    """conv, pool to 2 x 2, flatten, two FC layers.

    Groups: 4 outputs of conv, 4 inputs of fc1 each; 5 outputs of fc1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.fc1 = nn.Linear(4 * 2 * 2, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.conv(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Transposed(nn.Module):
    """A transposed conv between two convs. Groups: 5 outputs of stem; 6 of up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 5)
        self.up = nn.ConvTranspose2d(5, 6, 2, stride=2)
        self.head = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.stem(x).relu()).relu())


class GroupTransposed(nn.Module):
    """A grouped transposed conv. One group: 3 conv groups, with 2 outputs of stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.up = nn.ConvTranspose2d(6, 12, 2, stride=2, groups=3)
        self.head = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.stem(x).relu()).relu())


class Scaled(nn.Module):
    """A layer scale. One group: 6 outputs of stem, which take gamma along."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 6).reshape(6, 1, 1))
        self.head = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) * self.gamma)


class SqueezeExcite(nn.Module):
    """An SE block. Groups: 6 outputs of stem and expand; 3 outputs of squeeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.squeeze = conv(6, 3, 1)
        self.expand = conv(3, 6, 1)
        self.head = conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        scale = self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()
        return self.head(x * self.expand(scale).sigmoid())


class TinyDetector(nn.Module):
    """Backbone, two-level FPN and a head of two towers, shared over the levels.

    Groups: 4 outputs of stem; 6 of stage1; 8 of stage2; 6 of lateral1 and lateral2,
    which are added; 6 of fpn1 and fpn2, which both towers read; 5 of cls_tower; 5 of
    reg_tower. cls_pred and reg_pred are the outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 4, bias=False), nn.BatchNorm2d(4)
        self.stage1 = conv(4, 6, stride=2)
        self.stage2 = conv(6, 8, stride=2)
        self.lateral1, self.lateral2 = conv(6, 6, 1), conv(8, 6, 1)
        self.fpn1, self.fpn2 = conv(6, 6), conv(6, 6)
        self.cls_tower, self.reg_tower = conv(6, 5), conv(6, 5)
        self.cls_pred, self.reg_pred = conv(5, 3), conv(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        c1 = self.stage1(self.bn(self.stem(x)).relu()).relu()
        c2 = self.stage2(c1).relu()
        p2 = self.lateral2(c2)
        p1 = self.lateral1(c1) + F.interpolate(p2, scale_factor=2)
        levels = self.fpn1(p1), self.fpn2(p2)
        cls = [self.cls_pred(self.cls_tower(p).relu()) for p in levels]
        reg = [self.reg_pred(self.reg_tower(p).relu()) for p in levels]
        return *cls, *reg


#: All of the above, for tests that hold for any network.
TOYS = [
    ConvPair,
    ResidualPair,
    SharedHead,
    DepthWise,
    GroupConv,
    Concat,
    Shuffle,
    GroupNormHead,
    FlattenLinear,
    Transposed,
    GroupTransposed,
    Scaled,
    SqueezeExcite,
    TinyDetector,
]
