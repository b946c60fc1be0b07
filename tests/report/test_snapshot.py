"""What the file of a pruned model says, read back."""

import numpy as np
import pytest
import torch
from torch import nn

from mmgfp import ChannelPruner, PruneStructure
from mmgfp.engine.artifact import choices, costs_in_numbers, save_artifact
from mmgfp.report.snapshot import layer_widths, read_snapshot
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.utils.errors import StructureError


def test_widths_count_output_channels():
    shapes = {'stem.weight': [8, 3, 3, 3], 'fc.weight': [10, 8]}
    kept = {'stem.weight': {0: [0, 2, 5]}, 'fc.weight': {1: [0, 2, 5]}}
    structure = PruneStructure(sizes=shapes, kept=kept)
    vectors = {'stem.bias': [8], 'bn.weight': [8]}
    widths = {'stem': (3, 8), 'fc': (10, 10)}
    assert layer_widths(structure, shapes | vectors) == widths
    transposed = {'stem': (3, 8), 'fc': (3, 8)}
    assert layer_widths(structure, shapes, {'fc.weight': 1}) == transposed
    gone = PruneStructure(identities=('block',))
    shapes = {'stem.weight': [8, 3, 3, 3], 'block.a.weight': [16, 8, 3, 3]}
    assert layer_widths(gone, shapes) == {'stem': (8, 8), 'block.a': (0, 16)}


@pytest.fixture
def pruned(tmp_path):
    """A pruner that has reached its target, its decision, and the file of its model."""
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.ReLU())
    model = nn.Sequential(*parts, nn.Conv2d(6, 4, 1))
    images = torch.randn(2, 3, 8, 8)
    pruner = ChannelPruner(model, interval=1, units_per_step=4, target=dict(params=0.7))
    pruner.prepare(lambda m: m(images).square().mean(), lambda m: m(images), 2)
    while not pruner.done:
        model(images).square().mean().backward()
        step = pruner.step()
    units, path = pruner.units, tmp_path / 'net.pth'
    facts = (pruner.config, pruner.discovery, units.kept, step.importance)
    facts += (pruner.limits,)
    costs = costs_in_numbers(units.totals, units.full)
    meta = {'costs': costs, 'iter': 3, 'input_shape': (3, 8, 8), **choices(*facts)}
    save_artifact(path, pruner.compact(), units.structure(), meta)
    return pruner, step, path


def test_all_that_a_file_says(pruned):
    pruner, step, path = pruned
    units, snapshot = pruner.units, read_snapshot(path, 'params70')
    first, second = np.split(units.kept, [8])
    assert snapshot.widths == {
        '0': (first.sum(), 8),
        '2': (second.sum(), 6),
        '4': (4, 4),
    }
    assert (snapshot.iteration, snapshot.input_shape) == (3, (3, 8, 8))
    assert snapshot.criterion == 'fisher'
    for cost in snapshot.costs:
        key = cost.quantity.key
        assert cost.remaining == units.totals[key]
        assert cost.before == pytest.approx(units.full[key])
    assert [c.quantity.label for c in snapshot.costs] == ['MACs', 'memory', 'params']
    group = snapshot.groups[0]
    assert (group.units, group.remaining) == (8, first.sum())
    assert (group.modules('out'), group.modules('in')) == (['0'], ['2'])
    stay = np.sort(step.importance[:8][first])
    assert group.importance == (stay[0], pytest.approx(np.median(stay)), stay[-1])
    assert snapshot.frozen == units.grouping.frozen
    assert [layer.layer for layer in snapshot.frozen] == ['4']
    assert snapshot.narrow == NarrowGroups(1, ())


def test_units_of_unknown_importance_do_not_count(pruned):
    pruner, _, _ = pruned
    importance = np.arange(14.0)
    importance[:8] = np.nan
    facts = (pruner.config, pruner.discovery, np.ones(14, bool))
    groups = choices(*facts, importance, pruner.limits)['groups']
    assert groups[0]['importance'] is None
    assert groups[1]['importance'].tolist() == [8.0, 10.5, 13.0]
    unknown = choices(*facts, None, pruner.limits)['groups']
    assert unknown[1]['importance'] is None


def test_a_file_of_before_has_channels_alone(pruned):
    _, _, path = pruned
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, 'meta': {'iter': 90}}, path)  # as fine-tuning would
    snapshot = read_snapshot(path, 'x')
    assert snapshot.widths['0'][1] == 8 and not snapshot.costs
    assert snapshot.groups is snapshot.frozen is snapshot.iteration is None
    del checkpoint['prune_structure']
    torch.save(checkpoint, path)
    assert read_snapshot(path, 'x') is None


@pytest.mark.parametrize(
    'meta',
    [
        {'groups': [{}]},
        {'frozen': [3]},
        {'narrow': {}},
        {'shapes': {'0.weight': 3}},
        {'costs': {'macs': 3}},
        {'input_shape': 1},
    ],
)
def test_damage_is_named(meta, pruned):
    _, _, path = pruned
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, 'meta': meta}, path)
    with pytest.raises(StructureError, match=r'net\.pth must be a checkpoint that a'):
        read_snapshot(path, 'x')
