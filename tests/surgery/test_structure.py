"""Structures by hand, their files, and what is refused."""

import copy
import json

import pytest
import torch
from support.toys import ConvPair, FlattenLinear, ResidualPair, Shuffle, structure_of

from mmgfp.surgery.compact import compact_
from mmgfp.surgery.structure import STRUCTURE_KEY, PruneStructure, shapes_of
from mmgfp.utils.errors import StructureError
from mmgfp.utils.io import save_checkpoint


@pytest.fixture
def structure():
    """A ConvPair without units 1 and 4 of its 6."""
    return structure_of(ConvPair(), [1, 4])


LEFT = [0, 2, 3, 5]


def test_kept_indices_by_hand(structure):
    norm = {f'bn.{n}': {0: LEFT} for n in ('weight', 'bias')}
    running = {f'bn.running_{n}': {0: LEFT} for n in ('mean', 'var')}
    layers = {'conv1.weight': {0: LEFT}, 'conv2.weight': {1: LEFT}}
    assert structure.kept == norm | running | layers
    assert structure.sizes['conv1.weight'] == [6, 3, 3, 3]
    assert structure.shape('conv1.weight') == [4, 3, 3, 3]
    assert structure.shape('conv2.weight') == [4, 4, 3, 3]
    assert structure.attributes == {}


def test_two_groups_meet_in_one_tensor():
    # Units 0 to 5 are the outputs of stem and conv2, 6 to 10 those of conv1.
    structure = structure_of(ResidualPair(), [0, 7, 8])
    assert structure.kept['conv1.weight'] == {0: [0, 3, 4], 1: [1, 2, 3, 4, 5]}
    assert structure.kept['conv2.weight'] == {0: [1, 2, 3, 4, 5], 1: [0, 3, 4]}
    assert structure.shape('conv2.weight') == [5, 3, 3, 3]


def test_wide_units_take_all_their_entries():
    kept = structure_of(FlattenLinear(), [2]).kept['fc1.weight']
    assert kept == {1: [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]}
    assert structure_of(Shuffle(), [1]).kept['head.weight'] == {1: [0, 1, 4, 5, 6, 7]}


def test_nothing_pruned_is_an_empty_structure():
    net = ConvPair()
    structure = structure_of(net, [])
    assert structure == PruneStructure()
    before = copy.deepcopy(net.state_dict())
    compact_(net, structure)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


# -- files --


def test_json_round_trip(structure, tmp_path):
    path = tmp_path / 'new' / 'structure.json'
    structure.save(path)
    assert PruneStructure.load(path) == structure
    assert json.loads(path.read_text()) == structure.to_dict()
    assert structure.to_dict()['version'] == 1


def test_checkpoint_round_trip(structure, tmp_path):
    path = tmp_path / 'model.pth'
    net = compact_(ConvPair(), structure)
    checkpoint = {'state_dict': net.state_dict(), STRUCTURE_KEY: structure.to_dict()}
    save_checkpoint(checkpoint, path)
    found = PruneStructure.load(path)
    assert found == structure
    again = compact_(ConvPair(), found)
    weights = torch.load(path, weights_only=True)['state_dict']
    again.load_state_dict(weights, strict=True)


def test_attributes_round_trip():
    structure = PruneStructure(attributes={'extractor.out_channels': 7})
    assert PruneStructure.from_dict(structure.to_dict()) == structure


def test_missing_file(tmp_path):
    words = r'nowhere\.json must be .*nothing there.*model\.structure=FILE'
    with pytest.raises(StructureError, match=words):
        PruneStructure.load(tmp_path / 'nowhere.json')


@pytest.mark.parametrize('text', ['{"version": 1, "tensors": {', '', '[' * 10**5, '\0'])
def test_damaged_json(text, tmp_path):
    path = tmp_path / 'cut.json'
    path.write_text(text)
    with pytest.raises(StructureError, match=r'cut\.json must be'):
        PruneStructure.load(path)


def test_truncated_checkpoint(structure, tmp_path):
    path = tmp_path / 'cut.pth'
    save_checkpoint({STRUCTURE_KEY: structure.to_dict()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    words = r'cut\.pth must be a checkpoint that loads.*cut short'
    with pytest.raises(StructureError, match=words):
        PruneStructure.load(path)


def test_checkpoint_without_a_structure(tmp_path):
    path = tmp_path / 'plain.pth'
    save_checkpoint({'state_dict': {}}, path)
    words = r"plain\.pth must be a checkpoint with the key 'prune_structure'"
    with pytest.raises(StructureError, match=words):
        PruneStructure.load(path)


# -- validation --


@pytest.mark.parametrize(
    ('raw', 'got'),
    [
        ({'version': 2, 'tensors': {}}, 'got 2'),
        ({'tensors': {}}, 'got None'),
        ([], 'got None'),
        ('structure', 'got None'),
    ],
)
def test_other_versions(raw, got):
    words = rf'must be a structure of version 1 \({got}\); use the file that a mmgfp'
    with pytest.raises(StructureError, match=words):
        PruneStructure.from_dict(raw)


@pytest.mark.parametrize(
    'tensors',
    [
        None,
        [],
        {'conv.weight': None},
        {'conv.weight': {'shape': [4]}},
        {'conv.weight': {'shape': 4, 'kept': {}}},
        {'conv.weight': {'shape': [4], 'kept': [0]}},
        {'conv.weight': {'shape': [4], 'kept': {'zero': [0]}}},
        {'conv.weight': {'shape': [4], 'kept': {'0': ['first']}}},
        {'conv.weight': {'shape': [float('inf')], 'kept': {}}},
    ],
)
def test_malformed_tensors(tensors):
    words = r'my file must be a dict of tensors with shape and kept \(got'
    with pytest.raises(StructureError, match=words):
        PruneStructure.from_dict({'version': 1, 'tensors': tensors}, 'my file')


@pytest.mark.parametrize(
    ('kept', 'below'),
    [
        ({'0': [0, 6]}, 6),
        ({'0': [-1, 2]}, 6),
        ({'0': [3, 2]}, 6),
        ({'0': [2, 2]}, 6),
        ({'0': []}, 6),
        ({'0': list(range(7))}, 6),
        ({'4': [0]}, 0),
        ({'-1': [0]}, 0),
    ],
    ids=['high', 'negative', 'unsorted', 'twice', 'empty', 'long', 'dim', 'no dim'],
)
def test_wrong_indices(kept, below):
    raw = {'version': 1, 'tensors': {'conv1.weight': {'shape': [6, 3], 'kept': kept}}}
    words = rf'conv1\.weight dimension -?\d must be ascending indices below {below}'
    with pytest.raises(StructureError, match=words):
        PruneStructure.from_dict(raw)


@pytest.mark.parametrize('width', [0, -3, 2.5, True, '4', None])
def test_wrong_attributes(width):
    raw = {'version': 1, 'tensors': {}, 'attributes': {'extractor.out_channels': width}}
    words = r'extractor\.out_channels must be a number of channels'
    with pytest.raises(StructureError, match=words):
        PruneStructure.from_dict(raw)


# -- fitting a model --


def test_another_architecture(structure):
    words = r'conv1\.weight must .* shape \[6, 3, 3, 3\] \(got \[5, 6, 3, 3\]\); use it'
    with pytest.raises(StructureError, match=words):
        compact_(ResidualPair(), structure_with(structure, 'conv1.weight'))


def structure_with(structure, name):
    """The part of ``structure`` that speaks of one tensor."""
    return PruneStructure({name: structure.sizes[name]}, {name: structure.kept[name]})


def test_a_missing_tensor(structure):
    words = r'bn\.bias must be of shape \[6\] \(got no such tensor'
    with pytest.raises(StructureError, match=words):
        compact_(ResidualPair(), structure_with(structure, 'bn.bias'))


def test_a_model_that_is_compact_already(structure):
    net = compact_(ConvPair(), structure)
    with pytest.raises(StructureError, match=r'must be of shape \[6.*got \[4'):
        compact_(net, structure)


def test_a_refused_structure_changes_nothing(structure):
    net = ResidualPair()
    before = shapes_of(net)
    with pytest.raises(StructureError):
        compact_(net, structure)
    assert shapes_of(net) == before


def test_a_crafted_structure_allocates_no_more_than_the_model_has(structure):
    """Sizes are checked against the model, and indices against the sizes."""
    raw = structure.to_dict()
    entry = raw['tensors']['conv1.weight']
    entry['shape'][0] = 10**12
    entry['kept']['0'] = [0, 10**12 - 1]
    with pytest.raises(StructureError, match=r'must be of shape \[1000000000000'):
        compact_(ConvPair(), PruneStructure.from_dict(raw))


@pytest.mark.parametrize('name', ['conv1.groups', 'conv9.out_channels', 'training', 1])
def test_a_crafted_attribute_is_no_larger_than_the_models(name):
    raw = {'version': 1, 'tensors': {}, 'attributes': {name: 2}}
    structure = PruneStructure.from_dict(raw)
    with pytest.raises(StructureError, match=r'must be a number of at least 2 \(got'):
        compact_(ConvPair(), structure)
