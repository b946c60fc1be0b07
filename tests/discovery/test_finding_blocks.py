"""Residual blocks are found where they return their input exactly, and nowhere else."""

import pytest
import torch
from support.residual import Block, GatedBlock, OuterBlock, PreBlock, ResidualNet
from support.toys import toy_forward, toy_loss
from torch import nn
from torch.nn import functional as F

from mmgfp.discovery.discover import discover


def found(net, keep=(), loss=toy_loss):
    """The blocks of a network, each with its last norm or layer."""
    for module in net.modules():  # no norm hides anything, nor is anything symmetric
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
    options = dict(keep=keep, blocks=True)
    blocks = discover(net, loss, toy_forward, 2, **options).grouping.blocks
    return [(block.name, block.last) for block in blocks]


class Changed(Block):
    """A block whose function of x and the branch is given."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.scalar = nn.Parameter(torch.ones(()))
        self.scales = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.layer = nn.Parameter(torch.eye(6)[..., None, None])

    def forward(self, x):
        return self.run(self, x)


def even(x):
    """Crop images to an even height and width."""
    return x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]


@pytest.mark.parametrize(
    ('block', 'last'),
    [
        (Block, 'bn2'),
        (PreBlock, 'conv2'),
        (GatedBlock, 'bn2'),  # behind it, zeroed layers of the gate change nothing
        (OuterBlock, 'bn2'),  # the inner one goes with it
        (lambda: Changed(lambda b, x: F.dropout(b.branch(x), 0.3) + x), 'bn2'),
    ],
)
def test_blocks_that_return_their_input(block, last):
    assert found(ResidualNet(block())) == [('blocks.0', f'blocks.0.{last}')]


@pytest.mark.parametrize(
    'run',
    [
        lambda b, x: F.leaky_relu(x + b.branch(x)) * 2,
        lambda b, x: (x - 0.1 + b.branch(x)).relu(),  # no more than nearly
        lambda b, x: b.branch(x).relu(),
        lambda b, x: b.branch(x) + x.flip(1),
        lambda b, x: b.branch(x) + x.mean(1, keepdim=True),
        lambda b, x: b.branch(x) + x if b.training else b.branch(x),
        lambda b, x: b.branch(b.branch(x) + x) + x,  # of two calls of each layer
        # They do on the batch, as long as nothing is trained.
        lambda b, x: F.relu6(x + b.branch(x)),
        lambda b, x: even(x + b.branch(x)),
        lambda b, x: x * b.scalar + b.branch(x),
        lambda b, x: x * b.scales + b.branch(x),
        lambda b, x: F.conv2d(x, b.layer) + b.branch(x),
    ],
)
def test_modules_that_do_not(run):
    assert found(ResidualNet(Block(), Changed(run))) == [('blocks.0', 'blocks.0.bn2')]


def test_a_signed_input_is_not_returned_by_relu():

    class Signed(ResidualNet):
        def forward(self, x):
            return self.head(self.blocks(self.stem(x)))

    assert found(Signed()) == [('blocks.1', 'blocks.1.bn2')]


def test_blocks_that_share_or_come_twice_stay():
    twice, tied, plain = Block(), Block(), Block()
    tied.conv1.weight = plain.conv1.weight
    assert found(ResidualNet(twice, twice, tied, plain, Block())) == [
        ('blocks.4', 'blocks.4.bn2')
    ]


def test_a_module_that_is_called_with_more_than_a_tensor_stays():
    class Scaled(Block):
        def forward(self, x, scale=1):
            return self.branch(x) * scale + x

    class Scaling(ResidualNet):
        def forward(self, x):
            return self.head(self.blocks[0](self.stem(x).relu(), scale=2))

    assert found(Scaling(Scaled())) == []


@pytest.mark.parametrize(
    ('keep', 'left'),
    [
        (['blocks.0'], [1]),
        (['blocks.1.conv1'], [0]),
        (['stem'], [0, 1]),
    ],
)
def test_keep_protects_blocks(keep, left):
    blocks = [f'blocks.{i}' for i in left]
    assert [name for name, _ in found(ResidualNet(), keep)] == blocks


def test_a_block_of_which_the_rest_of_the_model_reads_a_part_stays():
    """It returns its input, but the model without it fails or gives something else."""

    class Reading(ResidualNet):
        def forward(self, x):
            scale = 1 + self.blocks[0].bn1.weight.mean()
            return self.head(self.blocks(self.stem(x).relu() * scale))

    assert found(Reading()) == [('blocks.1', 'blocks.1.bn2')]


def test_the_model_is_left_as_it_is():
    net = ResidualNet()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    discover(net, toy_loss, toy_forward, 2, blocks=True)
    assert torch.rand(1) == expected
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert net.training


def test_what_a_block_keeps_is_that_of_its_call():
    class Keeping(Block):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    class Reading(ResidualNet):
        def forward(self, x):
            x = self.blocks(self.stem(x).relu())
            return self.head(x + getattr(self.blocks[0], 'kept', 0))

    assert found(Reading(Keeping(), Block())) == [('blocks.1', 'blocks.1.bn2')]
