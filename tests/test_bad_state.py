"""Damaged, foreign and crafted files: refused in one line before anything changes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from support.pruning import hooks_on, iterate, prepared
from support.states import saved_and_loaded
from support.toys import (
    ConvPair,
    DepthWise,
    FlattenLinear,
    GroupConv,
    TinyDetector,
    Transposed,
    structure_of,
    toy_loss,
)

from mmgfp import ChannelPruner, GroupFisherPruner
from mmgfp.criteria.base import CRITERIA, Criterion, Scores
from mmgfp.engine.deploy import deploy, recorded_shape
from mmgfp.selection.targets import Target
from mmgfp.surgery.compact import compact_
from mmgfp.surgery.structure import PruneStructure, shapes_of
from mmgfp.utils.errors import ConfigError, StructureError


@pytest.fixture(scope='module')
def state():
    """What a checkpoint of a pruning run holds, and a model to resume it with."""
    return prepared(TinyDetector(), interval=1).state_dict()


def resume(state, make_optimizers=lambda model: ()):
    """Resume, which must fail and change nothing; then the pruner is as new."""
    model = TinyDetector()
    optimizers = make_optimizers(model)
    before = copy.deepcopy(model.state_dict())
    pruner = GroupFisherPruner(model, interval=1)
    try:
        pruner.load_state_dict(state, optimizers)
    finally:
        after = model.state_dict()
        assert all(torch.equal(t, after[n]) for n, t in before.items())
        assert hooks_on(model) == 0
        assert pruner.iteration == 0 and pruner.reached == ()
        with pytest.raises(ConfigError, match='not prepared'):
            pruner.step()
        pruner.prepare(toy_loss, toy_loss, 2)
        pruner.close()


def members(state):
    """Those of the first group, each by the names of its fields."""
    return state['discovery']['groups'][0]['members']


def set_member(place, value, which=0):
    def change(state):
        members(state)[which][place] = value

    return change


def set_index(change_index):
    def change(state):
        entry = members(state)[0]
        entry['index'] = change_index(entry['index'].clone())

    return change


def first_index(value):
    """The first channel of the first unit becomes another one."""

    def change(state):
        index = members(state)[0]['index']
        index[0, 0] = value(index) if callable(value) else value

    return change


def fields(**values):
    return lambda state: state.update(values)


def option(**values):
    return lambda state: state['options'].update(values)


def found(part, **values):
    return lambda state: state['discovery'][part].update(values)


def in_profile(**values):
    return lambda state: state['discovery']['profiles']['stem.weight'].update(values)


def units_of_inputs(value):
    return lambda state: state['discovery']['inputs']['stage1.weight'].fill_(value)


INF, NAN = float('inf'), float('nan')
CRAFTED = {
    'no such tensor': (set_member('name', 'stem.nothing'), "KeyError: 'stem.nothing'"),
    'no name': (set_member('name', ['stem']), 'AttributeError'),
    'attribute that counts no channels': (
        lambda s: members(s)[1].update(name='stem.stride', role='attribute'),
        "KeyError: 'stem.stride'",
    ),
    'role': (set_member('role', 'evil', which=1), r"\w+\.\w+: role 'evil'"),
    'high dimension': (set_member('dim', 4), 'stem.weight has no dimension 4'),
    'negative dimension': (set_member('dim', -4), 'stem.weight has no dimension -4'),
    'dimension of a kind': (
        set_member('dim', 0.0),
        r'stem.weight has no dimension 0\.0',
    ),
    'huge index': (first_index(2**62), 'stem.weight has no such channels'),
    'negative index': (first_index(-1), 'stem.weight has no such channels'),
    'one channel twice': (
        first_index(lambda index: index[1, 0].item()),
        'stem.weight: channels of several units',
    ),
    'floats': (set_index(lambda i: i.double()), 'stem.weight: indices of float64'),
    'booleans': (set_index(lambda i: i.bool()), 'stem.weight: indices of bool'),
    'one row': (set_index(lambda i: i[:, 0]), r'stem.weight: indices of int64 \(4,\)'),
    'no units': (set_index(lambda i: i[:0]), r'stem.weight: indices of int64 \(0, 1\)'),
    'fewer units than others': (
        set_member('index', torch.arange(3)[:, None], which=1),
        r'\w+\.\w+: 3 units, not 4',
    ),
    'no maker': (
        lambda s: [m.update(role='with') for m in members(s)],
        'no layer makes the group stem',
    ),
    'not a tensor': (set_member('index', [[0]]), 'AttributeError'),
    'missing part of a member': (
        lambda s: members(s)[0].pop('role'),
        "argument: 'role'",
    ),
    'inputs of no weight': (
        found('inputs', nothing=torch.zeros(3).long()),
        'no weight nothing',
    ),
    'huge unit': (units_of_inputs(10**9), 'stage1.weight reads no such units'),
    'negative unit': (units_of_inputs(-2), 'stage1.weight reads no such units'),
    'more inputs than channels': (
        found('inputs', **{'stage1.weight': torch.zeros(10**6).long()}),
        'stage1.weight reads 4 channels, not 1000000',
    ),
    'rows of no layer': (
        lambda s: s['discovery']['rows']['first'].append('nothing'),
        r"no layers \['nothing'\]",
    ),
    'unknown kind of rows': (found('rows', evil=[]), 'TypeError: .*evil'),
    'profile of no weight': (
        found('profiles', nothing=dict(macs_positions=1.0, out_positions=1.0)),
        'no weight nothing',
    ),
    'infinite positions': (in_profile(macs_positions=INF), 'stem.weight: LayerProfile'),
    'no number': (in_profile(out_positions='many'), 'stem.weight: LayerProfile'),
    'negative positions': (in_profile(out_positions=-1.0), 'stem.weight: LayerProf'),
    'another dimension': (in_profile(out_dim=3), 'stem.weight: LayerProfile'),
    'no options': (
        lambda s: s.pop('options'),
        r"a pruning state \(got KeyError: 'options'",
    ),
    'other version': (
        fields(version=1),
        r'a pruning state of version 2 \(got version 1\); start pruning anew from the',
    ),
    'other option': (
        option(coupled=False),
        r'coupled must be False \(got True\); resume with the configuration that',
    ),
    'other layers kept': (
        option(keep=['stem']),
        r"keep must be \['stem'\] \(got \[\]\); ",
    ),
    'other criterion': (
        option(criterion='l1'),
        r"criterion must be 'l1' \(got 'fisher'\); ",
    ),
    'no discovery': (fields(discovery={}), r"got KeyError: 'groups'\); res"),
    'short mask': (fields(kept=torch.ones(3)), r'mask of 40 units \(got 3'),
    'no mask': (fields(kept=None), r'a pruning state \(got AttributeError'),
    'mask of numbers': (
        fields(kept=torch.ones(40)),
        r'a mask of 40 units that leaves some of each group \(got float32',
    ),
    'two masks': (
        fields(kept=torch.ones(1, 40, dtype=torch.bool)),
        r'a mask of 40 units \(got',
    ),
    'no units left': (lambda s: s.pop('in_model'), "got KeyError: 'in_model'"),
    'units that were cut out and stay': (
        lambda s: s['in_model'][:1].fill_(False),
        r'kept units among those that are in the model \(got others',
    ),
    'nothing left of a group': (
        lambda s: s['kept'][:4].fill_(False),
        r'a mask of 40 units that leaves some of each group \(got none of stem',
    ),
    'target': (
        fields(reached=[dict(cost='flops', ratio=7)]),
        r'target\.flops must be a ratio',
    ),
}


@pytest.mark.parametrize('name', CRAFTED)
def test_crafted_pruning_state_is_refused(state, name):
    change, words = CRAFTED[name]
    crafted = copy.deepcopy(state)
    change(crafted)
    with pytest.raises(ConfigError, match=words) as caught:
        resume(crafted)
    assert '\n' not in str(caught.value) and ';' in str(caught.value)


def test_crafted_statistics_are_refused(state):
    for importance in (torch.zeros(()), torch.zeros(10**6), torch.zeros(40, 1)):
        sums = state['criterion'] | dict(importance=importance)
        with pytest.raises(ConfigError, match=r'must be statistics of 40 units \(got'):
            resume(state | dict(criterion=sums))


def test_optimizer_that_cannot_be_cut_leaves_the_model_alone():
    pruner = prepared(TinyDetector(), interval=1)
    pruner.units.prune(np.array([0, 1]))
    assert pruner.compact_()

    def used(model):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        toy_loss(model).backward()
        optimizer.step(lambda: toy_loss(model))
        return [optimizer]

    with pytest.raises(ConfigError, match='optimizer must be one that keeps'):
        resume(pruner.state_dict(), used)


def test_failed_resume_ends_what_the_pruner_did_before(state):
    """It was prepared and pruned: it must not seem to go on with other groups."""
    pruner = prepared(TinyDetector(), interval=1)
    sums = dict(importance=torch.zeros(3))
    with pytest.raises(ConfigError, match='statistics of 40 units'):
        pruner.load_state_dict(state | dict(criterion=sums))
    assert hooks_on(pruner.model) == 0
    pruner.load_state_dict(state)
    assert pruner.units.kept.all() and hooks_on(pruner.model)


@pytest.mark.parametrize('act', [copy.copy, copy.deepcopy, pickle.dumps])
def test_pruner_is_not_copied(act):
    for pruner in (prepared(ConvPair()), ChannelPruner(ConvPair())):
        with pytest.raises(ConfigError) as caught:
            act(pruner)
        name = type(pruner).__name__
        assert str(caught.value) == (
            f'a {name} cannot be copied or pickled, as its hooks stay on this model '
            f'(got copy, deepcopy or pickle); give state_dict() to load_state_dict of '
            f'a new {name} of the other model, unpruned'
        )


# -- options that mean the same ---------------------------------------------------


@CRITERIA.register('weighted', 'by_weight')
class Weighted(Criterion):
    """Scores that are given.

    Args:
        by: Anything.
    """

    def __init__(self, by=1.0):
        self.by = by

    def attach(self, context):
        self.count = len(context.group_of)

    def scores(self, reduce=None):
        return Scores(np.arange(self.count) + 1.0)


ARRAY, TENSOR = np.array([0.5, NAN]), torch.tensor([0.5, NAN])


@pytest.mark.parametrize(
    ('first', 'second'),
    [
        ('weighted', dict(type='by_weight')),
        (dict(type='weighted', by=ARRAY), dict(type='by_weight', by=ARRAY.copy())),
        (dict(type='weighted', by=TENSOR), dict(by=ARRAY, type='weighted')),
        (dict(type='weighted', by=(1, [2.0])), dict(type='weighted', by=[1, (2.0,)])),
        (dict(type='weighted', by=NAN), dict(type='weighted', by=float('nan'))),
        (
            dict(type='weighted', by=dict(a=ARRAY, f=toy_loss)),
            dict(type='weighted', by=dict(f=toy_loss, a=ARRAY)),
        ),
    ],
)
def test_criterion_with_the_same_arguments_is_resumed(first, second):
    pruner = ChannelPruner(TinyDetector(), criterion=first, keep=['fpn1', 'st*m'])
    pruner.prepare(toy_loss, toy_loss, 2)
    state = saved_and_loaded(pruner.state_dict())  # by weights_only=True
    again = ChannelPruner(TinyDetector(), criterion=second, keep=['st*m', 'fpn1'])
    again.load_state_dict(state)
    assert again.units.kept.all()


@pytest.mark.parametrize(
    ('by', 'words'),
    [
        (np.arange(3.0), r"'by': \[0\.0, 1\.0, 2\.0\]}\); resume with"),
        (np.arange(999.0), r"'by': \[0\.0, 1\.0, .{20,80} \.\.\.\); resume with"),
        (torch.zeros(2, 2), r"'by': tensor\(\[\[0\., 0\.\], \[0\., 0\.\]\]\)}\); res"),
        (TENSOR.tolist()[::-1], r"'by': \[nan, 0\.5\]}\); resume with"),
    ],
)
def test_criterion_with_other_arguments_is_not_resumed(by, words):
    pruner = ChannelPruner(ConvPair(), criterion=dict(type='weighted', by=TENSOR))
    pruner.prepare(toy_loss, toy_loss, 2)
    other = ChannelPruner(ConvPair(), criterion=dict(type='weighted', by=by))
    with pytest.raises(ConfigError, match=r'^criterion must be .*got .*' + words) as e:
        other.load_state_dict(pruner.state_dict())
    assert '\n' not in str(e.value)


def test_target_by_another_name_is_reached_already():
    pruner = prepared(ConvPair(), interval=1, target=dict(flops=0.9))
    while not pruner.done:
        iterate(pruner)
    again = GroupFisherPruner(ConvPair(), target=[dict(macs=0.9), dict(macs=0.5)])
    again.load_state_dict(saved_and_loaded(pruner.state_dict()))
    assert again.pending == [Target('flops', 0.5)]


def test_state_as_it_was_is_accepted(state):
    """The changes above are what is refused."""
    pruner = GroupFisherPruner(TinyDetector(), interval=1)
    pruner.load_state_dict(state)
    assert pruner.iteration == state['iteration']
    assert pruner.units.kept.tolist() == state['kept'].tolist()
    sums = pruner.criterion.state_dict()
    assert all(torch.equal(t, sums[n]) for n, t in state['criterion'].items())


def test_state_of_another_model_is_refused(state):
    pruner = GroupFisherPruner(ConvPair(), interval=1)
    words = r'checkpoint must be the groups .* model \(got KeyError: .*\); resume'
    with pytest.raises(ConfigError, match=words):
        pruner.load_state_dict(state)


# -- structures -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('toy', 'tensor', 'kept', 'words'),
    [
        (ConvPair, 'bn.bias', [0, 1, 2, 3], r'bn\.bias .* 4 others\); use the file'),
        (ConvPair, 'bn.running_var', None, r'bn\.running_var must keep the channels'),
        (ConvPair, 'bn.weight', [5], r'bn\.bias .*\(got 4 others'),
        (DepthWise, 'expand.bias', None, r'expand\.bias .* weight keeps \(got all'),
        (FlattenLinear, 'conv.bias', [1], r'conv\.bias .*\(got 1 others'),
        (Transposed, 'stem.bias', [2, 3], r'stem\.bias .*\(got 2 others'),
        (
            GroupConv,
            'mid.weight',
            [0, 6, 7, 8],
            r'mid\.weight must keep as many .* group of the conv.* \(got \[1, 3\]',
        ),
    ],
)
def test_structure_whose_tensors_disagree_is_refused(toy, tensor, kept, words):
    raw = structure_of(toy(), [0, 1]).to_dict()
    if kept is None:
        raw['tensors'].pop(tensor)
    else:
        raw['tensors'][tensor]['kept']['0'] = kept
        if toy is GroupConv:
            raw['tensors']['mid.bias']['kept']['0'] = kept
    net = toy()
    with pytest.raises(StructureError, match=words) as caught:
        compact_(net, PruneStructure.from_dict(raw))
    assert '\n' not in str(caught.value)
    assert shapes_of(net) == shapes_of(toy())


@pytest.mark.parametrize('kept', [[0.0, 1.0], [True, 2], '01', {0: 1}, [0, None]])
def test_structure_of_other_things_than_whole_numbers_is_refused(kept):
    entry = {'shape': [6, 3], 'kept': {'0': kept}}
    raw = {'version': 1, 'tensors': {'conv1.weight': entry}}
    with pytest.raises(StructureError, match='is no list of whole numbers'):
        PruneStructure.from_dict(raw)


def test_tied_weights_keep_what_their_first_name_says():
    """The second layer's weight is the first one's; both biases are cut with it."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)
            self.b.weight = self.a.weight
            self.head = torch.nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head((self.a(x) + self.b(x)).relu())

    raw = structure_of(Tied(), [0, 1]).to_dict()
    assert {'a.weight', 'a.bias', 'b.bias'} <= set(raw['tensors'])
    small = compact_(Tied(), PruneStructure.from_dict(raw))
    assert small.a.weight is small.b.weight and len(small.b.bias) == 2


# -- names and sizes --------------------------------------------------------------


@pytest.mark.parametrize('name', ['../evil', '/tmp/evil', 'a/b', '..', '', '.'])
def test_deployment_writes_only_into_its_folder(tmp_path, name):
    out = tmp_path / 'out'
    words = r'--name must be a file name \(got .*\); name the folder with --out'
    with pytest.raises(ConfigError, match=words):
        deploy(None, None, out, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'shape',
    [(3, 10**6, 10**6), (3, 64), 'wide', (3, -1, 64), (3, 64.0, 64), [True] * 3],
)
def test_image_size_that_a_checkpoint_names_is_bounded(shape):
    words = (
        r'meta.input_shape of the checkpoint must be \(C, H, W\), each at most 8192 '
        r'\(got .*\); name the size with --input-shape'
    )
    with pytest.raises(ConfigError, match=words):
        recorded_shape({'input_shape': shape})
    assert recorded_shape({'input_shape': (3, 800, 1280)}) == (3, 800, 1280)
    assert recorded_shape({}) is None


@pytest.mark.parametrize('bad', [-5, float('inf'), float('nan'), 'x', None])
def test_iterations_are_counted(state, bad):
    with pytest.raises(ConfigError, match='checkpoint must be a pruning state'):
        resume({**state, 'iteration': bad})
