"""Blocks of random nets that are written in unusual ways.

What they do to channels is plain, but not how: parameters that no layer owns, weights
that are read twice, constants, rows that are no images, and tensors changed in place.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.toys import conv


class PadShortcut(nn.Module):
    """A layer that widens, beside its input with zeros for the channels it lacks.

    The pads are fixed, or computed from the widths: halves, or all of them last.
    """

    def __init__(self, c_in, before, after, kind):
        super().__init__()
        self.width = c_in + before + after
        self.layer = conv(c_in, self.width)
        self.pads, self.kind = (before, after), kind
        self.needs_verification = before + after > 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        missing = y.shape[1] - x.shape[1]
        before = {'fixed': self.pads[0], 'halves': missing // 2, 'last': 0}[self.kind]
        after = self.pads[1] if self.kind == 'fixed' else missing - before
        return F.relu(y + F.pad(x, (0, 0, 0, 0, before, after)))


class Functional(nn.Module):
    """A parameter of the block, called ``weight`` or not, that a function reads."""

    def __init__(self, c_in, c_out, kind, name):
        super().__init__()
        self.width = c_in if kind == 'depth-wise' else c_out
        shape = {'conv': (c_in, 3, 3), 'linear': (c_in,), 'depth-wise': (1, 3, 3)}
        weight = nn.Parameter(torch.randn(self.width, *shape[kind]) / 3)
        self.register_parameter(name, weight)
        self.bias = nn.Parameter(torch.randn(self.width) / 3)
        self.kind, self.name = kind, name
        self.groups = c_in if kind == 'depth-wise' else 1

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.name)
        if self.kind == 'linear':
            return F.relu(F.linear(x.movedim(1, -1), weight, self.bias).movedim(-1, 1))
        groups = x.shape[1] if self.groups > 1 else 1
        return F.relu(F.conv2d(x, weight, self.bias, padding=1, groups=groups))


class Tied(nn.Module):
    """A weight that reads twice: by functions, by a layer and a function, or by two.

    ``'parameter'``, ``'linear'`` and ``'conv'`` go back by its transpose; ``'again'``
    and ``'layers'`` apply it to its own result.
    """

    def __init__(self, c_in, inner, kind):
        super().__init__()
        self.width, self.kind = c_in, kind
        if kind == 'parameter':
            self.shared = nn.Parameter(torch.randn(inner, c_in) / 3)
        elif kind == 'linear':
            self.layer = nn.Linear(c_in, inner)
        else:
            self.layer = conv(c_in, inner if kind == 'conv' else c_in)
        if kind == 'layers':
            self.second = conv(c_in, c_in)
            self.second.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 'layers':
            return self.second(F.relu(self.layer(x)))
        if self.kind == 'again':
            return F.conv2d(F.relu(self.layer(x)), self.layer.weight, padding=1)
        if self.kind == 'conv':
            y = F.relu(self.layer(x))
            return F.conv_transpose2d(y, self.layer.weight, padding=1)
        x = x.movedim(1, -1)
        if self.kind == 'linear':
            x = F.linear(F.relu(self.layer(x)), self.layer.weight.t())
        else:
            x = F.linear(F.relu(F.linear(x, self.shared)), self.shared.t())
        return x.movedim(-1, 1)


class BothViews(nn.Module):
    """The same layers on the input and its mirror image, joined."""

    def __init__(self, c_in, c_out, joined):
        super().__init__()
        self.layers = nn.Sequential(conv(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU())
        self.joined = joined
        self.width = c_out * (2 if joined == 'concat' else 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layers(x), self.layers(x.flip(3))
        return torch.cat([a, b], 1) if self.joined == 'concat' else a * b


class Folded(nn.Module):
    """Parts of an image as rows of a batch: halves in two orders, or all its points."""

    def __init__(self, c_in, c_out, kind):
        super().__init__()
        points = kind == 'points'
        self.layer = nn.Linear(c_in, c_out) if points else conv(c_in, c_out)
        self.kind, self.width = kind, c_out

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 'points':
            x = x.movedim(1, -1)
            rows = self.layer(x.flatten(0, 2))
            return F.relu(rows.view(*x.shape[:3], -1).movedim(-1, 1))
        if self.kind == 'cycled':
            rows = self.layer(torch.cat(x.chunk(2, 2)))
            return F.relu(torch.cat(rows.chunk(2), 2))
        rows = self.layer(x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1))
        return F.relu(rows.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3))


class Fixed(nn.Module):
    """Buffers of channel width: a frozen norm's, as vectors or maps, or filters."""

    def __init__(self, c_in, kind, persistent):
        super().__init__()
        self.width, self.kind = c_in, kind
        scale = torch.linspace(0.5, 1.5, c_in)
        if kind == 'filter':
            scale = scale[:, None, None, None] * torch.linspace(-1, 1, 9).view(3, 3)
        elif kind == 'map':
            scale = scale[None, :, None, None]
        self.register_buffer('scale', scale, persistent=persistent)
        self.register_buffer('shift', scale.flip(0) - 1, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 'filter':
            return F.conv2d(x, self.scale, padding=1, groups=x.shape[1])
        if self.kind == 'map':
            return x * self.scale + self.shift
        return x * self.scale[:, None, None] + self.shift[:, None, None]


class InPlace(nn.Module):
    """Two layers whose outputs, and the input of the second, are changed in place."""

    def __init__(self, c_in, c_out, first, second):
        super().__init__()
        self.a, self.b = conv(c_in, c_out), conv(c_out, c_out, 1)
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, c_out)[:, None, None])
        self.norm = nn.BatchNorm2d(c_out)
        self.first, self.second = first, second
        self.width = c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        for op in self.first:
            self._change(y, op, 0.5)
        y.relu_()
        z = self.b(y)
        for op in self.second:
            self._change(z, op, y)
        return z

    def _change(self, x: Tensor, op: str, term) -> None:
        if op == 'add':
            x.add_(term)
        elif op == 'mul':
            x.mul_(self.factor)
        else:
            x.neg_()


class ChangingConv(nn.Conv2d):
    """A convolution that changes what it is given, or reads it twice."""

    def __init__(self, width, kind):
        super().__init__(width, width, 3, padding=1)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 'square':
            return super().forward(x.square())
        if self.kind == 'in place':
            return super().forward(x.relu_())
        if self.kind == 'residual':
            return super().forward(x) + x
        return super().forward(x) + F.relu(super().forward(x.flip(3)))


class Changing(nn.Module):
    """A layer ahead of a `ChangingConv`."""

    def __init__(self, c_in, c_out, kind):
        super().__init__()
        self.before = conv(c_in, c_out, 1)
        self.layer = ChangingConv(c_out, kind)
        self.width = c_out

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.before(x))
