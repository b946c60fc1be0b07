"""Small networks with residual blocks; each takes images (N, 3, H, W)."""

from torch import Tensor, nn
from torch.nn import functional as F

from support.toys import conv


class Block(nn.Module):
    """A post-activation block, ReLU(x + branch(x)), of two convolutions with norms."""

    def __init__(self, channels: int = 6, inner: int = 5) -> None:
        super().__init__()
        self.conv1 = conv(channels, inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x  # in place, as ResNets do
        return out.relu()


class PreBlock(Block):
    """A block that ends in a convolution with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = conv(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class GatedBlock(Block):
    """A block with squeeze-and-excitation behind its last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.expand = conv(6, 2, 1), conv(2, 6, 1)

    def branch(self, x: Tensor) -> Tensor:
        out = super().branch(x)
        gate = self.squeeze(F.adaptive_avg_pool2d(out, 1)).relu()
        return out * self.expand(gate).sigmoid()


class OuterBlock(Block):
    """A block with another one within its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(self.inner(x))


class ResidualNet(nn.Module):
    """A stem, ReLU, blocks and a head of 4 channels.

    Groups, where all are of `Block`: 6 outputs of stem and of each conv2; 5 outputs of
    each conv1.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 6), conv(6, 4)
        self.blocks = nn.Sequential(*(blocks or (Block(), Block(inner=4))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()))
