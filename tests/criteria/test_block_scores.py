"""Scores of residual blocks against gradients of explicit masks, image by image."""

import pytest
import torch
from support.pruning import importance_of
from support.residual import Block, OuterBlock, PreBlock, ResidualNet
from support.toys import images, square_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmgfp import ChannelPruner
from mmgfp.utils.errors import ConfigError

BATCHES = [images(3, seed=seed) for seed in (1, 2)]


def net_of(*kinds):
    torch.manual_seed(0)
    net = ResidualNet(*(kind() for kind in kinds))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return net


def loss_of(x, net):
    return square_loss(net(x)) * len(x)


def scores(net, criterion):
    """What the pruner adds up for the blocks of ``net`` over all batches, (B,)."""
    options = dict(interval=10**6, blocks=True, criterion=criterion)
    pruner = ChannelPruner(net, **options)
    x = BATCHES[0]
    pruner.prepare(lambda m: loss_of(x, m), lambda m: m(x), len(x))
    for x in BATCHES:
        net.zero_grad()
        loss_of(x, net).backward()
        pruner.step()
    pruner.close()
    first = pruner.units.grouping.units - len(pruner.units.grouping.blocks)
    return torch.from_numpy(importance_of(pruner)[first:])


def mask_gradients(net, x):
    """Gradients of a mask on what each block's last layer puts out, (N, B)."""
    masks, handles = [], []
    for block in net.blocks:
        last = block.conv2 if isinstance(block, PreBlock) else block.bn2
        masks.append(torch.ones(len(x), 1, 1, 1, requires_grad=True))

        def scale(module, args, output, mask=masks[-1]):
            return output * mask

        handles.append(last.register_forward_hook(scale))
    gradients = torch.autograd.grad(loss_of(x, net), masks)
    for handle in handles:
        handle.remove()
    return torch.stack([g.flatten() for g in gradients], 1).double()


@pytest.mark.parametrize('criterion', ['fisher', 'taylor'])
@pytest.mark.parametrize(
    'kinds', [(Block, Block), (OuterBlock, PreBlock)], ids=['norms', 'layer, nested']
)
def test_scores_are_squared_mask_gradients(kinds, criterion):
    found = scores(net_of(*kinds), criterion)
    net = net_of(*kinds)
    expected = 0
    for x in BATCHES:
        rows = mask_gradients(net, x)
        rows = rows if criterion == 'fisher' else rows.sum(0, keepdim=True)
        expected = expected + rows.square().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_gradient_of_a_mask_is_that_of_the_norm_times_its_parameters():
    """Σ A · ∂L/∂A = Σ γ · ∂L/∂γ + β · ∂L/∂β, which torch gives for a batch."""
    net = net_of(Block, Block)
    found = scores(net_of(Block, Block), 'taylor')
    expected = torch.zeros(2, dtype=torch.float64)
    for x in BATCHES:
        net.zero_grad()
        loss_of(x, net).backward()
        for i, block in enumerate(net.blocks):
            tensors = block.bn2.parameters()
            expected[i] += sum((t * t.grad).sum().double() for t in tensors) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


class Checkpointed(Block):
    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize('kind', [Checkpointed, Reentrant])
def test_checkpointed_blocks_score_the_same(kind):
    expected = scores(net_of(Block, Block), 'fisher')
    torch.testing.assert_close(scores(net_of(kind, kind), 'fisher'), expected)


def test_training_is_the_same_bit_by_bit():
    nets = [net_of(Block, Block) for _ in range(2)]
    for net, blocks in zip(nets, (False, True), strict=True):
        pruner = ChannelPruner(net, interval=10**6, blocks=blocks)
        x = BATCHES[0]
        pruner.prepare(lambda m, x=x: loss_of(x, m), lambda m, x=x: m(x), 3)
        loss_of(x, net).backward()
        pruner.step()
    pairs = zip(*(net.parameters() for net in nets), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(criterion='l1'), r"one that scores residual blocks.*\(got 'l1'\)"),
        (dict(criterion=dict(type='taylor', of='weights')), 'criterion must be one'),
        (dict(scope='local'), "'global'.*compete with .*got 'local'"),
        (dict(blocks=1), 'blocks must be True or False'),
    ],
)
def test_what_cannot_be_scored_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ChannelPruner(ResidualNet(), **{'blocks': True, **options})
