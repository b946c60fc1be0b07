"""Profiling of small models in the runtimes, and profiles fitted to known times."""

import json

import numpy as np
import pytest
import torch
from mmengine.hub import get_config
from support.configs import FASTER, MASK, slim
from support.latency import made_up
from torch import nn

from mmgfp.discovery.discover import discover
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.latency.check import Check
from mmgfp.latency.cuts import checking_cuts, fitting_cuts, with_whole
from mmgfp.latency.fit import Layer, fit_profile, merged
from mmgfp.latency.graph import times_of_layers
from mmgfp.latency.measure import LatencyProfiler
from mmgfp.latency.pieces import Piece, pieces_of, roi_counts
from mmgfp.latency.timers import TIMERS, LayerTimer
from mmgfp.selection.costs import CostTable, LayerProfile, TensorSizes
from mmgfp.selection.latency import Latency
from mmgfp.selection.latency_profile import LatencyProfile
from mmgfp.utils.errors import ConfigError


class Small(nn.Module):
    """A residual block, a depth-wise convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 32, 1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.outer(self.inner(x).relu())).relu()
        return self.fc(self.depth(x).relu().mean((2, 3)))


LAYERS = [f'{n}.weight' for n in ('stem', 'inner', 'outer', 'depth', 'fc')]


@pytest.fixture(scope='module')
def found():
    """The model and its discovery."""
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(2, 3, 32, 32)
    calls = (lambda m: m(images).square().mean(), lambda m: m(images), 2)
    return model, discover(model, *calls)


class ByMACs(LayerTimer):
    """A nanosecond for each multiply-accumulate, and a microsecond for each layer."""

    name = package = 'numpy'
    cuts = 0

    def measure(self, piece):
        type(self).cuts += 1
        times = {}

        def hook(module, args, output):
            name = next(n for n, m in piece.module.model.named_modules() if m is module)
            positions = output[0, 0].numel()
            macs = positions * module.weight.numel()
            times[f'{name}.weight'] = 1e-6 * macs + 1e-3

        layers = [m for m in piece.module.modules() if hasattr(m, 'weight')]
        layers = [m for m in layers if not isinstance(m, nn.BatchNorm2d)]
        handles = [m.register_forward_hook(hook) for m in layers]
        piece.module(*piece.inputs)
        for handle in handles:
            handle.remove()
        return times


def profiler(found, path, timer=None, **options):
    model, discovery = found
    facts = (discovery.grouping, discovery.profiles)
    options = dict(shape=(3, 32, 32), path=path, notify=str) | options
    return LatencyProfiler(model, *facts, timer or ByMACs(), **options)


def test_known_times_are_predicted(found, tmp_path):
    """Bilinear times are fitted exactly, at widths that were not measured as well."""
    measuring = profiler(found, tmp_path / 'table.json')
    profile = measuring.measure(cuts=12)
    assert list(profile.layers) == LAYERS
    kinds = {layer.kind for layer in profile.layers.values()}
    assert kinds == {'conv', 'pointwise', 'depthwise', 'linear'}
    assert profile == LatencyProfile.load(tmp_path / 'table.json')
    for multiple in (1, 8):
        checks = measuring.check(profile, 4, multiple)
        assert max(abs(check.error) for check in checks) < 0.01
        assert [check.macs for check in checks].count(1.0) == 1
        assert checks[0].macs == 1.0 and checks[0].ratio_error == 0
        assert all(check.measured > 0 for check in checks)


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino', 'torch'])
def test_a_model_in_its_runtime(found, tmp_path, runtime):
    """All layers take time, and narrow models less than wide ones."""
    pytest.importorskip(runtime)
    timer = TIMERS[runtime]()
    profile = profiler(found, tmp_path / 'table.json', timer).measure(cuts=8)
    assert profile.origin['runtime'] == runtime
    assert profile.origin['threads'] == 1
    assert profile.origin['not_measured'] == []
    model, discovery = found
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    groups = discovery.grouping.groups
    costs = {'latency': Latency(profile)}
    table = CostTable(shapes, discovery.profiles, groups, costs)
    sizes = np.array([g.units for g in groups])
    full, small = (table.totals(sizes - n)['latency'] for n in (sizes, sizes // 4))
    assert 0 < small < full


def test_times_are_those_of_the_whole(found):
    """What layers take adds up to the run, with all that lies between them."""
    pytest.importorskip('onnxruntime')
    model, _ = found
    timer = TIMERS['onnxruntime']()
    timer.lowest = lambda run: 0.25
    (piece,) = pieces_of(model, (3, 32, 32))
    times = timer.measure(piece)
    assert list(sorted(times)) == sorted(LAYERS)
    assert sum(times.values()) == pytest.approx(250)
    assert min(times.values()) > 0


def test_nodes_are_told_apart():
    """A fused addition bears a name of neither convolution: it is the one left."""
    owners = {0: ('a',), 1: ('b',), 2: ('a', 'b'), 3: ('c',), 4: ()}
    events = [
        ('@4@', 'Pad', 1.0),  # before any layer: the first one's
        ('@0@9_nchwc', 'Conv', 2.0),
        ('@2@8_nchwc', 'Conv', 4.0),  # b with the addition
        ('ReorderOutput', 'ReorderOutput', 8.0),
        ('@3@', 'Gemm', 16.0),
    ]
    assert times_of_layers(events, owners) == {'a': 3.0, 'b': 12.0, 'c': 16.0}


def test_a_killed_profiling_goes_on(found, tmp_path):
    path, other = tmp_path / 'table.json', tmp_path / 'whole.json'
    profiler(found, other).measure(cuts=10)
    whole = json.loads(other.read_text())['cuts']

    class Killed(ByMACs):
        left = 4

        def measure(self, piece):
            Killed.left -= 1
            if Killed.left < 0:
                raise KeyboardInterrupt
            return super().measure(piece)

    with pytest.raises(KeyboardInterrupt):
        profiler(found, path, Killed()).measure(cuts=10)
    with pytest.raises(ConfigError, match='ends after 4 cuts'):
        LatencyProfile.load(path)
    ByMACs.cuts = 0
    for _ in range(2):  # the second time, there is nothing left to measure
        profile = profiler(found, path).measure(cuts=10)
        assert json.loads(path.read_text())['cuts'] == whole
        assert LatencyProfile.load(path) == profile
        assert ByMACs.cuts == len(whole) - 4


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(timer=ByMACs(threads=2)), r'threads in .* must be 2 \(got 1\)'),
        (dict(batch=4), r'batch in .* must be 4 \(got 1\)'),
        (dict(shape=(3, 16, 16)), r'input_shape in .* must be \[3, 16, 16\]'),
        (dict(origin=dict(processor='other')), "processor in .* must be 'other'"),
    ],
)
def test_another_machine_does_not_go_on(found, tmp_path, options, words):
    path = tmp_path / 'table.json'
    profiler(found, path).measure(cuts=8)
    before = path.read_text()
    with pytest.raises(ConfigError, match=words):
        profiler(found, path, **options)
    assert path.read_text() == before


def test_another_model_does_not_go_on(found, tmp_path):
    path = tmp_path / 'table.json'
    profiler(found, path).measure(cuts=8)
    raw = json.loads(path.read_text())
    raw['model']['inner.weight'] = [64, 32, 3, 3]
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match='the shape of inner.weight in .*32, 32, 3'):
        profiler(found, path)
    path.write_text('{')
    with pytest.raises(ConfigError, match='a profile'):
        profiler(found, path)


def test_layers_that_do_not_run_are_refused(found, tmp_path):
    class Half(ByMACs):
        def measure(self, piece):
            times = super().measure(piece)
            del times['inner.weight']
            return times

    with pytest.raises(ConfigError, match='inner.weight, in all .* of the MACs'):
        profiler(found, tmp_path / 'table.json', Half()).measure(cuts=8)


def test_unknown_devices_are_refused():
    with pytest.raises(ConfigError, match='--device must be one .*cpu'):
        TIMERS['onnxruntime'](device='cuda')


def test_steps_and_broken_layouts_are_fitted():
    """A layer in blocks of 16, twice as slow to read at widths that are not even."""
    rng = np.random.default_rng(0)
    layers = {f'{i}.weight': Layer('conv', (128, 64, 3, 3), 0) for i in range(4)}
    sizes, widths = np.array([64, 128] * 4), np.ones(8, dtype=int)
    cuts = []
    for units in fitting_cuts(sizes, widths, 40, rng):
        pairs = dict(zip(layers, units.reshape(4, 2).tolist(), strict=True))
        times = {
            n: (1 + 7 * i / 64 * -(-o // 16) / 8) * (2 if i % 2 else 1)
            for n, (i, o) in pairs.items()
        }
        cuts.append(dict(units=units.tolist(), widths=pairs, times=times))
    profiles = {n: LayerProfile(1.0, 1.0) for n in layers}
    profile = fit_profile({}, layers, profiles, cuts)
    kind = profile.kinds['conv']
    assert kind.steps == (1, 16)
    assert kind.factors[0] == pytest.approx([2, 1, 1, 1, 1, 1], rel=0.15)
    assert kind.factors[1] == pytest.approx([1] * 6, rel=0.05)
    for layer in profile.layers.values():
        assert layer.times == pytest.approx((1, 0, 0, 7), abs=0.5)


@pytest.mark.parametrize('surplus', [0.0, 0.2])
def test_a_whole_model_that_misses_caches(surplus):
    """Layers that no bilinear time fits: the whole model is met, and so are cuts.

    One of five measurements of the whole model was disturbed.
    """
    rng = np.random.default_rng(0)
    layers = {f'{i}.weight': Layer('conv', (64, 64, 3, 3), 0) for i in range(4)}
    sizes = np.full(8, 64)
    cuts = []
    plan = fitting_cuts(sizes, np.ones(8, dtype=int), 25, rng)
    for turn, units in enumerate([*plan, *[sizes] * 4]):
        pairs = dict(zip(layers, units.reshape(4, 2).tolist(), strict=True))
        area = {n: i * o / 64**2 for n, (i, o) in pairs.items()}
        disturbed = 1.5 if turn == 26 else 1.0
        times = {
            n: disturbed * (1 + 9 * a) * (1 - surplus * (1 - a**2))
            for n, a in area.items()
        }
        cuts.append(dict(units=units.tolist(), widths=pairs, times=times))
    profiles = {n: LayerProfile(1.0, 1.0) for n in layers}
    profile = fit_profile({}, layers, profiles, cuts)
    whole = sum(sum(layer.times) for layer in profile.layers.values())
    assert whole == pytest.approx(40)
    assert profile.surplus <= surplus + 1e-9  # layers take a part of the bend
    shapes, dims = np.tile([32, 32, 3, 3], (4, 1)), np.zeros(4, dtype=int)
    narrow = TensorSizes(np.array([*layers]), shapes, dims, np.ones(4), np.ones(4))
    half = Latency(profile).count(narrow).sum()
    expected = 4 * (1 + 9 / 4) * (1 - surplus * (1 - 1 / 16))
    assert half == pytest.approx(expected, rel=0.03)


def test_repeated_measurements_are_one():
    """Medians of the layers, which add up to the median of the whole."""
    times = ([1.0, 5.0], [2.0, 2.0], [3.0, 4.0])  # totals 6, 4, 7
    cuts = [dict(units=[1], times=dict(a=a, b=b)) for a, b in times]
    other = dict(units=[2], times=dict(a=1.0, b=1.0))
    first, second = merged([*cuts[:2], other, cuts[2]])
    assert first == dict(units=[1], times=dict(a=2.0, b=4.0))
    assert second == other


def test_the_whole_model_is_spread_over_a_run():
    cuts = [np.array([i]) for i in range(1, 9)]
    plan = with_whole(cuts, np.array([9]), 3)
    assert [int(n[0]) for n in plan] == [9, 1, 2, 3, 4, 9, 5, 6, 7, 8, 9]


def test_errors_of_a_share():
    """Predicted a half of 4 ms, measured two thirds of 3 ms."""
    check = Check(0.5, predicted=2.0, measured=2.0, whole=(4.0, 3.0))
    assert check.error == 0 and check.ratio_error == pytest.approx(-0.25)


def test_cuts_cover_the_widths():
    rng = np.random.default_rng(0)
    sizes, widths = np.array([64, 256, 8]), np.array([1, 1, 16])
    cuts = np.array(fitting_cuts(sizes, widths, 25, rng))
    assert len(cuts) == 25 and cuts[0].tolist() == sizes.tolist()
    assert (cuts >= 1).all() and (cuts <= sizes).all()
    aligned = cuts[1:13]
    assert not (aligned[:, :2] % 8).any()
    assert (cuts[13:, :2] % 8).any()
    near = cuts[10:13] / sizes  # every eighth one is nearly the whole model
    assert (near > 0.7).all() and (near < 1).any()
    # Of every group narrow, middle and wide ones.
    shares = aligned / sizes
    assert (shares.min(0) < 0.3).all() and (shares.max(0) > 0.8).all()


def test_checks_are_spread_over_the_macs(found):
    model, discovery = found
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    groups = discovery.grouping.groups
    table = CostTable(shapes, discovery.profiles, groups)
    sizes = np.array([g.units for g in groups])
    widths, rng = np.ones(len(groups), dtype=int), np.random.default_rng(0)
    cuts = checking_cuts(table, sizes, widths, 5, 1, rng)
    full = table.totals(np.zeros(len(groups)))
    ratios = [table.totals(sizes - n).ratio('macs', full) for n in cuts]
    assert all(0.2 <= ratio <= 0.7 for ratio in ratios)
    assert max(ratios) - min(ratios) > 0.2


@pytest.mark.parametrize('name', [FASTER, MASK])
def test_two_stages_run_in_two_pieces(name):
    """Every layer is in one of them, on as many RoIs as testing has."""
    pytest.importorskip('onnxruntime')
    config = slim(name)
    config.model.test_cfg.rpn.max_per_img = 20
    model = build_model(config).eval()
    calls = BatchCalls(model, demo_batch(config, 1, (64, 96)))
    profiles = calls.profile(model, (3, 64, 96))
    counts = roi_counts(model)
    assert counts == dict(bbox_head=20) | (dict(mask_head=100) if name == MASK else {})
    pieces = pieces_of(model.eval(), (3, 64, 96))
    assert len(pieces) == 2
    rois = [t for t in pieces[1].inputs if t.dim() == 2]
    assert sum(len(t) for t in rois) == sum(counts.values())
    timer = TIMERS['onnxruntime']()
    timed = [timer.measure(Piece(p.module, p.inputs)) for p in pieces]
    assert {*timed[0], *timed[1]} == {*profiles}
    assert all(n.startswith('roi_head.') for n in timed[1])
    assert min(t for times in timed for t in times.values()) > 0


def test_shared_heads_are_added_up():
    """RetinaNet's branches run on several levels: one row of the table."""
    pytest.importorskip('onnxruntime')
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8)
    model = build_model(cfg).eval()
    calls = BatchCalls(model, demo_batch(cfg, 1, (64, 64)))
    profiles = calls.profile(model, (3, 64, 64))
    (piece,) = pieces_of(model.eval(), (3, 64, 64))
    assert {*TIMERS['onnxruntime']().measure(piece)} == {*profiles}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    made_up(shapes, profiles).check_fits(shapes, profiles)
