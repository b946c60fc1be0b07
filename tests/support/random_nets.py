"""Random small convolutional nets, drawn by hypothesis.

A net is a chain of blocks, each a function of what came before, and a head. All widths
that code would need follow from tensors, so that a compact copy can run.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from support.random_blocks import (
    BothViews,
    Changing,
    Fixed,
    Folded,
    Functional,
    InPlace,
    PadShortcut,
    Tied,
)
from support.toys import conv


class Conv(nn.Module):
    """Convolution, norm and activation, the last two if drawn."""

    def __init__(self, c_in, c_out, kernel=3, groups=1, norm=True, active=True):
        super().__init__()
        self.conv = conv(c_in, c_out, kernel, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.active = active
        self.width = c_out

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.active else x


class Residual(nn.Module):
    """A branch of two layers beside the identity, or beside a projection."""

    def __init__(self, c_in, inner, c_out, project):
        super().__init__()
        self.width = c_out if project else c_in
        self.a = Conv(c_in, inner)
        self.b = Conv(inner, self.width, 1, active=False)
        self.skip = Conv(c_in, c_out, 1, active=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.b(self.a(x)))


class Concat(nn.Module):
    """Branches side by side, the input among them if drawn."""

    def __init__(self, c_in, widths, keep):
        super().__init__()
        self.branches = nn.ModuleList(Conv(c_in, w, norm=False) for w in widths)
        self.keep = keep
        self.width = sum(widths) + c_in * keep

    def forward(self, x: Tensor) -> Tensor:
        parts = [x] if self.keep else []
        return torch.cat([*parts, *(b(x) for b in self.branches)], 1)


class Split(nn.Module):
    """Halves, of which one is worked on; joined again, and shuffled if drawn."""

    def __init__(self, c_in, shuffle):
        super().__init__()
        self.even = Conv(c_in, c_in + c_in % 2, 1)
        self.width = self.even.width
        self.worked = Conv(self.width // 2, self.width // 2)
        self.shuffle = shuffle

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.even(x).chunk(2, 1)
        x = torch.cat([a, self.worked(b)], 1)
        if self.shuffle:
            n, _, h, w = x.shape
            x = x.view(n, 2, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return x


class GroupConv(nn.Module):
    """A layer ahead of a group convolution of any ratio of widths."""

    def __init__(self, c_in, groups, inside, outside):
        super().__init__()
        self.before = Conv(c_in, groups * inside, 1)
        self.grouped = Conv(groups * inside, groups * outside, groups=groups)
        self.width = groups * outside

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.before(x))


class DepthWise(nn.Module):
    """A depth-wise convolution with ``times`` outputs of each channel."""

    def __init__(self, c_in, times):
        super().__init__()
        self.dw = Conv(c_in, c_in * times, groups=c_in)
        self.width = c_in * times

    def forward(self, x: Tensor) -> Tensor:
        return self.dw(x)


class Shared(nn.Module):
    """One layer on two levels, which are added; on its own output, too, if drawn."""

    def __init__(self, c_in, c_out, twice):
        super().__init__()
        self.level = Conv(c_in, c_in, 1)
        self.layer = Conv(c_in, c_in if twice else c_out, norm=False)
        self.twice = twice
        self.width = c_in if twice else c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.twice:
            y = self.layer(y)
        small = self.layer(F.max_pool2d(self.level(x), 2))
        return y + F.interpolate(small, scale_factor=2.0)


class SqueezeExcite(nn.Module):
    """A gate on each channel, made from their means."""

    def __init__(self, c_in, inner):
        super().__init__()
        self.squeeze, self.expand = conv(c_in, inner, 1), conv(inner, c_in, 1)
        self.width = c_in

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * self.expand(gate).sigmoid()


class GroupNorm(nn.Module):
    """A layer and a GroupNorm, whose norm groups live and die together."""

    def __init__(self, c_in, groups, each):
        super().__init__()
        self.conv = conv(c_in, groups * each)
        self.norm = nn.GroupNorm(groups, groups * each)
        self.width = groups * each

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class UpDown(nn.Module):
    """A transposed convolution, and pooling back."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.width = c_out

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.relu(self.up(x)), 2)


class Head(nn.Module):
    """What reaches the loss: a map, means of channels, or all positions flattened."""

    def __init__(self, c_in, kind, hidden):
        super().__init__()
        self.kind = kind
        if kind == 'map':
            self.layer = nn.Sequential(Conv(c_in, hidden), conv(hidden, 3, 1))
            return
        positions = 4 if kind == 'flat' else 1
        self.layer = nn.Sequential(
            nn.Linear(c_in * positions, hidden), nn.ReLU(), nn.Linear(hidden, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 'flat':
            x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        elif self.kind == 'mean':
            x = x.mean((2, 3))
        return self.layer(x)


class RandomNet(nn.Module):
    """A stem, blocks and heads.

    Args:
        stem: Width of the first layer.
        blocks: The class of each block, and its arguments after the input's width.
        heads: The block that each further head reads, counted from the last, its kind
            and its hidden width.
        frames: How an image and its mirror image are folded into rows, which the heads'
            results are averaged over: ``'repeated'`` or ``'cycled'``; None for images.

    Attributes:
        needs_verification: Whether code depends on widths in ways that tracing a net
            cannot tell.
    """

    def __init__(self, stem, blocks, heads, frames=None):
        super().__init__()
        self.frames = frames
        self.stem = Conv(3, stem)
        self.blocks, widths = nn.ModuleList(), [stem]
        for kind, arguments in blocks:
            self.blocks.append(kind(widths[-1], *arguments))
            widths.append(self.blocks[-1].width)
        # The first one reads the last block, so that all blocks are part of the loss.
        self.places = [
            -1 - (place * bool(i)) % len(widths)
            for i, (place, _, _) in enumerate(heads)
        ]
        self.heads = nn.ModuleList(
            Head(widths[place], *rest)
            for place, (_, *rest) in zip(self.places, heads, strict=True)
        )
        self.needs_verification = any(
            getattr(block, 'needs_verification', False) for block in self.blocks
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.frames == 'repeated':
            x = torch.stack([x, x.flip(3)], 1).flatten(0, 1)
        elif self.frames == 'cycled':
            x = torch.cat([x, x.flip(3)])
        outputs = [self.stem(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return tuple(
            self._images(head(outputs[place]))
            for place, head in zip(self.places, self.heads, strict=True)
        )

    def _images(self, rows: Tensor) -> Tensor:
        if self.frames == 'repeated':
            return rows.unflatten(0, (-1, 2)).mean(1)
        return rows.unflatten(0, (2, -1)).mean(0) if self.frames else rows


def _block(kind, *arguments):
    return st.tuples(st.just(kind), st.tuples(*arguments))


_width, _few, _flag = st.integers(2, 7), st.integers(1, 3), st.booleans()
_changes = st.lists(st.sampled_from(['add', 'mul', 'neg']), max_size=2)


def _one_of(*names):
    return st.sampled_from(names)


_blocks = st.one_of(
    _block(Conv, _width, st.sampled_from([1, 3]), st.just(1), _flag, _flag),
    _block(Residual, _width, _width, _flag),
    _block(Concat, st.lists(_width, min_size=1, max_size=3), _flag),
    _block(Split, _flag),
    _block(GroupConv, st.integers(2, 4), _few, _few),
    _block(DepthWise, _few),
    _block(Shared, _width, _flag),
    _block(SqueezeExcite, _width),
    _block(GroupNorm, st.integers(2, 4), _few),
    _block(UpDown, _width),
    _block(
        PadShortcut,
        st.integers(0, 3),
        st.integers(0, 3),
        _one_of('fixed', 'halves', 'last'),
    ),
    _block(
        Functional,
        _width,
        _one_of('conv', 'linear', 'depth-wise'),
        _one_of('weight', 'kernel'),
    ),
    _block(Tied, _width, _one_of('parameter', 'linear', 'conv', 'again', 'layers')),
    _block(BothViews, _width, _one_of('product', 'concat')),
    _block(Folded, _width, _one_of('repeated', 'cycled', 'points')),
    _block(Fixed, _one_of('vector', 'map', 'filter'), _flag),
    _block(InPlace, _width, _changes, _changes),
    _block(Changing, _width, _one_of('square', 'in place', 'residual', 'twice')),
)
_heads = st.tuples(
    st.integers(0, 5), st.sampled_from(['map', 'mean', 'flat']), st.integers(2, 6)
)

#: Arguments of `RandomNet`.
specifications = st.tuples(
    _width,
    st.lists(_blocks, max_size=5),
    st.lists(_heads, min_size=1, max_size=2),
    st.sampled_from([None, None, None, 'repeated', 'cycled']),
)
