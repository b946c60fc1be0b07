"""Options, when weights go, and which ones can."""

import pytest
import torch
from torch import nn

from mmgfp.sparsity.config import SparsityConfig, Timetable, timetable
from mmgfp.sparsity.layers import COMPUTED, OTHER, select_weights
from mmgfp.utils.errors import ConfigError

BAD = [
    (dict(kind='magnitud'), "kind must be one of 'magnitude', .*got 'magnitud'"),
    (dict(kind=['nm']), 'kind must be one of'),
    (dict(sparsity=80), r'sparsity must be a number in \(0, 1\) \(got 80\)'),
    (dict(sparsity=1.0), 'sparsity must be a number in'),
    (dict(sparsity='0.8'), "sparsity must be a number in .*got '0.8'"),
    (dict(scope='layer'), "scope must be global or local .*got 'layer'"),
    (dict(schedule='cube'), "schedule must be one of cubic, linear, one_shot .*'cube'"),
    (dict(begin=-1), r'begin must be a whole number of at least 0 \(got -1'),
    (dict(begin=5, end=5), r'end must be a whole number above begin, 5 \(got 5'),
    (dict(end=9.5), 'end must be a whole number above begin, 0'),
    (dict(schedule='one_shot', end=9), "end must be left out with schedule='one_shot'"),
    (dict(by_epoch=1), 'by_epoch must be True or False'),
    (dict(interval=0), 'interval must be a whole number of at least 1'),
    (dict(keep='head'), "keep must be a list of layer names .*got 'head'"),
    (dict(n=2), r"n must be left out with kind='magnitude' \(got 2\); drop it"),
    (
        dict(kind='movement', sr_ste=True),
        'sr_ste must be left out with kind=',
    ),
    (dict(kind='movement', schedule='one_shot'), 'begin must be at least 1 with kind='),
    (dict(kind='nm', sparsity=0.5), "sparsity must be left out with kind='nm'"),
    (dict(kind='nm', scope='local'), "scope must be left out with kind='nm'"),
    (dict(kind='nm', schedule='cubic'), "schedule must be 'one_shot' with kind='nm'"),
    (dict(kind='nm', n=4), r'n must be less than m, 4 \(got 4'),
    (dict(kind='nm', n=0), 'n must be a whole number of at least 1'),
    (dict(kind='nm', m=1), 'm must be a whole number of at least 2'),
    (dict(kind='nm', m=2.5), 'm must be a whole number of at least 2'),
    (dict(kind='nm', sr_ste=1), 'sr_ste must be True or False'),
    (dict(kind='nm', decay=-1), 'decay must be a number of at least 0'),
]


@pytest.mark.parametrize(('options', 'words'), BAD)
def test_wrong_options_are_refused_in_one_line(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        SparsityConfig(**options)
    assert '\n' not in str(caught.value)


def test_density_on_the_way():
    cubic = SparsityConfig(sparsity=0.8)
    # 1 - 0.8 · (1 - (1 - p)³): Zhu and Gupta, eq. 1
    for progress, density in ((0, 1), (0.5, 0.3), (1, 0.2)):
        assert cubic.density_after(progress) == pytest.approx(density)
    linear = SparsityConfig(sparsity=0.8, schedule='linear')
    assert linear.density_after(0.25) == pytest.approx(0.8)
    assert SparsityConfig(kind='nm', n=1, m=8).density_after(1.0) == 1 / 8


@pytest.mark.parametrize(
    ('options', 'iterations', 'epoch', 'expected'),
    [
        (dict(), 1000, None, (0, 500)),
        (dict(begin=200), 1000, None, (200, 600)),
        (dict(begin=200, end=1000), 1000, None, (200, 1000)),
        (dict(begin=1, end=3, by_epoch=True), 400, 100, (100, 300)),
        (dict(begin=1, by_epoch=True), 400, 100, (100, 250)),
        (dict(schedule='one_shot', begin=7), 9, None, (7, 7)),
        (dict(kind='nm'), 9, None, (0, 0)),
        (dict(), 1, None, (0, 1)),
    ],
)
def test_times(options, iterations, epoch, expected):
    times = timetable(SparsityConfig(**options), iterations, epoch)
    assert times == Timetable(*expected, 100)
    due = [t for t in range(iterations + 1) if times.is_due(t)]
    assert due[-1] == times.end and times.progress(due[-1]) == 1


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (
            dict(end=101),
            r'end must be within the 100 iterations that the run has',
        ),
        (dict(begin=100), 'begin must be within the 100 iterations'),
        (dict(begin=3, end=6, by_epoch=True), 'end must be within the 5 epochs'),
        (dict(kind='nm', begin=100), 'begin must be within the 100 iterations'),
    ],
)
def test_times_behind_the_end_of_the_run(options, words):
    with pytest.raises(ConfigError, match=words):
        timetable(SparsityConfig(**options), 100, 20)


# -- layers -------------------------------------------------------------------


class ConvWS2d(nn.Conv2d):
    """Like mmcv's, by its name."""


class Mixed(nn.Module):
    """Layers of all sorts; ``second`` and ``tied`` have one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1)
        self.tied = nn.Conv2d(8, 8, 1)
        self.tied.weight = self.second.weight
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(24, 8, 1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.standard = ConvWS2d(8, 8, 1)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.plain = nn.Linear(8, 4)
        self.words = nn.Embedding(5, 8)
        self.out = nn.Linear(8, 5)
        self.out.weight = self.words.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.line = nn.Conv1d(4, 2, 3)


ALWAYS = {
    'standard': 'its weight is standardised in each pass, after which no zero is left',
    'frozen': 'frozen: nothing would make up for its zeros',
    'normed': COMPUTED,
    'words.weight': OTHER,
    'attention.in_proj_weight': OTHER,
}
DENSE_IN_GROUPS = {
    'first': '3 input channels, no multiple of 4',
    'depthwise': 'depth-wise: each output reads one channel',
    'grouped': '6 input channels of each conv group, no multiple of 4',
    'up': 'ConvTranspose2d has no sparse kernel',
}


def test_layers_that_take_part():
    model = Mixed()
    selection = select_weights(model, keep=['line', 'fir*'])
    kept = dict.fromkeys(['line', 'first'], 'kept as configured')
    assert dict(selection.left_out) == ALWAYS | kept
    names = ['second', 'depthwise', 'grouped', 'up', 'plain', 'attention.out_proj']
    assert list(selection.weights) == [f'{name}.weight' for name in names]
    assert selection.weights['second.weight'] is model.tied.weight


def test_layers_that_take_part_in_groups_of_four():
    selection = select_weights(Mixed(), multiple=4)
    assert dict(selection.left_out) == ALWAYS | DENSE_IN_GROUPS
    names = ['second', 'plain', 'attention.out_proj', 'line']
    assert list(selection.weights) == [f'{name}.weight' for name in names]


def test_weights_of_deformable_and_wrapped_convolutions():
    ops = pytest.importorskip('mmcv.ops')
    wrapped = pytest.importorskip('mmcv.cnn.bricks.wrappers').Conv2d(4, 4, 1)
    model = nn.Sequential(ops.DeformConv2d(4, 4, 3), wrapped)
    assert list(select_weights(model).weights) == ['0.weight', '1.weight']
    selection = select_weights(model, multiple=4)
    assert list(selection.weights) == ['1.weight']
    assert selection.left_out == {'0': 'DeformConv2d has no sparse kernel'}


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (
            dict(keep=['heads']),
            r"keep must be names or patterns .*\(got 'heads'\)",
        ),
        (dict(multiple=3), 'model must be one with weights .*got none; of 0: 4 input'),
        (dict(keep=['0']), 'none; of 0: kept as configured'),
    ],
)
def test_models_without_such_weights_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        select_weights(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), **options)


def test_weight_under_spectral_norm_is_listed_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4)))
    selection = select_weights(model)
    assert list(selection.weights) == ['0.weight']
    assert dict(selection.left_out) == {'1': COMPUTED}


@pytest.mark.parametrize('multiple', [None, 4])
def test_layers_without_a_shape_are_refused_in_one_line(multiple):
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.LazyConv2d(8, 3))
    words = r'model must be one whose parameters all have a shape \(got 1.weight of a '
    with pytest.raises(ConfigError, match=words) as caught:
        select_weights(net, multiple=multiple)
    assert '\n' not in str(caught.value)
