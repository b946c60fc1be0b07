"""Residual blocks go while a model trains: masked equals compact, cut equals masked."""

import copy

import numpy as np
import pytest
import torch
from support.pruning import hooks_on
from support.residual import Block, PreBlock, ResidualNet
from support.states import saved_and_loaded
from support.toys import conv, images, square_loss
from torch import nn

from mmgfp import ChannelPruner, PruneStructure
from mmgfp.compensation.compensate import compensate
from mmgfp.compensation.options import CompensationConfig
from mmgfp.discovery.comparing import difference
from mmgfp.surgery.compact import compact
from mmgfp.surgery.expand import take_over
from mmgfp.surgery.structure import shapes_of
from mmgfp.utils.errors import ConfigError, StructureError


class Training:
    """A residual network in double precision that is pruned while it trains."""

    def __init__(self, live=False, adam=False, **options):
        torch.manual_seed(0)
        self.model = ResidualNet(Block(), Block(), Block(inner=4), PreBlock()).double()
        kind = torch.optim.Adam if adam else torch.optim.SGD
        more = {} if adam else dict(momentum=0.9, weight_decay=0.01)
        self.optimizer = kind(self.model.parameters(), 0.01, **more)
        self.live = live
        options = {'interval': 2, 'target': dict(flops=0.3), **options}
        self.pruner = ChannelPruner(self.model, blocks=True, **options)
        self.average = copy.deepcopy(self.model)
        self.pruner.track_copy(self.average)
        self.steps = []

    def loss(self, model):
        seed = self.pruner.iteration
        return square_loss(model(images(3, seed=seed).double()))

    def prepare(self):
        self.pruner.prepare(self.loss, lambda m: m(images().double()), 3)
        return self

    def train(self, iterations):
        for _ in range(iterations):
            self.optimizer.zero_grad()
            self.loss(self.model).backward()
            self.optimizer.step()
            step = self.pruner.step()
            tensors = self.model.state_dict()
            for name, tensor in self.average.state_dict().items():
                tensor.lerp_(tensors[name], 0.3) if tensor.is_floating_point() else 0
            if step is not None:
                self.steps.append(step.units.tolist())
                if self.live:
                    self.pruner.compact_([self.optimizer])
        return self

    @property
    def gone(self):
        units = self.pruner.units
        return units.grouping.blocks_among(~units.kept)

    def outputs(self, model):
        model = copy.deepcopy(model).eval()
        return model(images(seed=9).double())


def test_a_block_that_is_gone_is_masked_and_cut():
    run = Training(normalize='none').prepare()
    grouping = run.pruner.units.grouping
    assert [b.name for b in grouping.blocks] == [f'blocks.{i}' for i in range(4)]
    assert grouping.units == 6 + 5 + 5 + 4 + 5 + 4
    run.train(14)
    assert run.gone and len(run.gone) < 4
    small = run.pruner.compact()
    structure = run.pruner.units.structure()
    assert structure.identities == tuple(run.gone)
    for name in run.gone:
        assert isinstance(small.get_submodule(name), nn.Identity)
        inner = [g for b in grouping.blocks if b.name == name
                 for g in grouping.groups_inside(b)]  # fmt: skip
        units = np.isin(grouping.group_of, inner)
        assert units.any() and not run.pruner.units.kept[units].any()
        last = next(b.last for b in grouping.blocks if b.name == name)
        for model in (run.model, run.average):
            tensors = model.get_submodule(last).parameters()
            assert all(not t.any() for t in tensors)
    assert difference(run.outputs(run.model), run.outputs(small)) < 1e-12
    average = run.pruner.compact(run.average)
    assert difference(run.outputs(run.average), run.outputs(average)) < 1e-12
    # Costs are those of the model that is left.
    params = sum(p.numel() for p in small.parameters())
    assert run.pruner.units.totals['params'] == params
    assert not any(structure.is_gone(name) for name in structure.kept)
    read = PruneStructure.from_dict(structure.to_dict())
    again = compact(ResidualNet(Block(), Block(), Block(inner=4), PreBlock()), read)
    again.double().load_state_dict(small.state_dict())
    assert difference(run.outputs(small), run.outputs(again)) == 0
    run.pruner.close()
    assert not hooks_on(run.model)


def test_loaded_weights_are_masked():
    run = Training(normalize='none').prepare().train(14)
    last = run.model.get_submodule(
        next(b.last for b in run.pruner.units.grouping.blocks if b.name in run.gone)
    )
    run.model.load_state_dict(
        {n: torch.ones_like(t) for n, t in run.model.state_dict().items()}
    )
    assert not any(t.any() for t in last.parameters())


@pytest.mark.parametrize('adam', [False, True])
def test_cutting_while_training_ends_as_masking_does(adam):
    masked, live = (Training(x, adam).prepare().train(30) for x in (False, True))
    assert masked.gone and masked.gone == live.gone
    assert masked.steps == live.steps
    assert any(isinstance(m, nn.Identity) for m in live.model.modules())
    left = {id(p) for p in live.model.parameters()}
    groups = live.optimizer.param_groups
    assert {id(p) for group in groups for p in group['params']} == left
    assert {id(p) for p in live.optimizer.state} <= left
    smalls = [run.pruner.compact() for run in (masked, live)]
    assert difference(*(masked.outputs(small) for small in smalls)) < 1e-9
    averages = [run.pruner.compact(run.average) for run in (masked, live)]
    assert difference(*(masked.outputs(small) for small in averages)) < 1e-9
    assert masked.pruner.units.structure() == live.pruner.units.structure()


@pytest.mark.parametrize('live', [False, True])
def test_a_resumed_run_decides_the_same(live):
    options = dict(live=live, target=dict(flops=0.05))
    whole = Training(**options).prepare().train(39)
    first = Training(**options).prepare().train(13)
    assert first.gone and first.gone != whole.gone
    again = Training(**options)
    state = saved_and_loaded(first.pruner.state_dict())
    again.pruner.load_state_dict(state, [again.optimizer])
    for ours, theirs in ((again.model, first.model), (again.average, first.average)):
        ours.load_state_dict(theirs.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.train(26)
    assert first.steps + again.steps == whole.steps
    for ours, theirs in ((again.model, whole.model), (again.average, whole.average)):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_states_of_another_kind_are_refused():
    state = Training().prepare().train(14).pruner.state_dict()
    plain = ChannelPruner(Training().model, target=dict(flops=0.3))
    with pytest.raises(ConfigError, match='blocks must be True'):
        plain.load_state_dict(state)
    wrong = copy.deepcopy(state)
    wrong['discovery']['blocks'][0]['last'] = 'head'
    with pytest.raises(ConfigError, match='no residual block'):
        Training().pruner.load_state_dict(wrong)
    wrong = copy.deepcopy(state)
    wrong['kept'][:] = False  # the stream's units, too
    with pytest.raises(ConfigError, match='leaves some of each group'):
        Training().pruner.load_state_dict(wrong)


def test_compensation_after_a_block_has_gone():
    """Layers behind it are refitted; the masked model takes over what they become."""
    run = Training().prepare()
    run.pruner.close()
    grouping, model = run.pruner.units.grouping, run.model
    batches = [images(4, seed=seed).double() for seed in range(4)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a mean over all batches
            module.reset_running_stats()
    for x in batches:
        model(x)
    kept = np.ones(grouping.units, dtype=bool)
    kept[grouping.units - 3] = False  # blocks.1
    for group in grouping.groups_inside(grouping.blocks[1]):
        kept[grouping.group_of == group] = False
    calls = [lambda m, x=x: m(x) for x in batches]
    config = CompensationConfig(method='least_squares')
    result = compensate(model.eval(), grouping, kept, calls, config)
    gone = grouping.blocks_among(~kept)
    structure = PruneStructure.of(grouping.groups, kept, shapes_of(model), gone)
    plain = compact(model, structure)
    assert isinstance(result.model.blocks[1], nn.Identity)
    refitted = [layer.layer for layer in result.layers if layer.reason is None]
    assert refitted and not any(structure.is_gone(name) for name in refitted)

    @torch.no_grad()
    def error(other):
        return sum(float((other(x) - model(x)).square().mean()) for x in batches)

    assert error(result.model) < error(plain)
    changed = take_over(model, result.model, structure)
    assert changed and not any(structure.is_gone(name) for name in changed)


def test_compensation_after_a_block_without_channels_of_its_own():
    """Its one convolution makes channels of the stage, none of which has gone."""

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(6, 6, bias=False), nn.BatchNorm2d(6)

        def forward(self, x):
            return (x + self.bn(self.conv(x))).relu()

    torch.manual_seed(0)
    model = ResidualNet(Single(), Block()).double().eval()
    batches = [images(4, seed=seed).double() for seed in range(4)]
    pruner = ChannelPruner(model, blocks=True)
    grouping = pruner.prepare(
        lambda m: square_loss(m(batches[0])), lambda m: m(batches[0]), 4
    )
    pruner.close()
    kept = np.ones(grouping.units, dtype=bool)
    kept[grouping.units - 2] = False
    assert grouping.blocks_among(~kept) == ['blocks.0']
    calls = [lambda m, x=x: m(x) for x in batches]
    config = CompensationConfig(method='least_squares')
    result = compensate(model, grouping, kept, calls, config)
    assert [layer.layer for layer in result.layers] == [
        'blocks.1.conv1.weight',
        'blocks.1.conv2.weight',
        'head.weight',
    ]
    assert any(layer.reason is None for layer in result.layers)


# -- structures -----------------------------------------------------------------


def raw(**changes):
    kept = {'shape': [6, 3, 3, 3], 'kept': {'0': [0, 2]}}
    tensors = {'stem.weight': kept, 'stem.bias': {'shape': [6], 'kept': {'0': [0, 2]}}}
    return dict(version=1, tensors=tensors, attributes={}, **changes)


@pytest.mark.parametrize(
    ('identities', 'words'),
    [
        (['stem'], 'stem.weight must be outside of the modules that are replaced'),
        (['blocks', 'blocks.0'], 'blocks.0 must be outside'),
        ([''], 'no list of different names'),
        (['blocks.0', 'blocks.0'], 'no list of different names'),
        ('blocks.0', 'no list of different names'),
        ([3], 'no list of different names'),
    ],
)
def test_wrong_identities_are_refused(identities, words):
    with pytest.raises(StructureError, match=words) as error:
        PruneStructure.from_dict(raw(identities=identities))
    assert '\n' not in str(error.value)


def test_a_module_that_the_model_lacks_is_refused():
    structure = PruneStructure(identities=('blocks.7',))
    with pytest.raises(StructureError, match=r'blocks.7 must be a module to replace'):
        compact(ResidualNet(), structure)


def test_files_without_identities_are_as_before():
    assert 'identities' not in PruneStructure().to_dict()
    assert PruneStructure.from_dict(raw()).identities == ()


def test_a_module_is_replaced_wherever_it_stands():
    net = ResidualNet()
    net.alias = net.blocks[1]
    small = compact(net, PruneStructure(identities=('blocks.1',)))
    assert small.alias is small.blocks[1]
    assert isinstance(small.alias, nn.Identity)
    assert isinstance(net.alias, Block)
