"""Latency as a cost: a table worked out by hand, savings, decisions, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.latency import made_up, write

from mmgfp.config import PruningConfig
from mmgfp.groups import ChannelGroup, Member
from mmgfp.selection.costs import CostTable, LayerProfile, RunningCosts
from mmgfp.selection.greedy import Limits, select_units
from mmgfp.selection.latency import Latency, best_divisor
from mmgfp.selection.latency_profile import KindLatency, LatencyProfile, LayerLatency
from mmgfp.utils.errors import ConfigError

#: a makes 32 channels of 8, b reads them; a norm goes along and takes no time itself.
SHAPES = {'a.weight': (32, 8, 1, 1), 'n.weight': (32,), 'b.weight': (16, 32, 1, 1)}
PROFILES = {n: LayerProfile(100.0, 100.0) for n in ('a.weight', 'b.weight')}
INDEX = np.arange(32)[:, None]
GROUP = ChannelGroup(
    'a',
    (
        Member('a.weight', 0, INDEX, 'out'),
        Member('n.weight', 0, INDEX, 'with'),
        Member('b.weight', 1, INDEX, 'in'),
    ),
)
#: Factors by what divides a width: 1, 2, 4, 8, 16, 32.
PLAIN = (1.0,) * 6
BROKEN = (3.0, 2.0, 1.0, 1.0, 1.0, 1.0)


def table(a=(1, 0, 2, 5), b=(0, 4, 0, 4), kind=None, surplus=0.0):
    """Costs of the two layers, which take 8 ms each at full width."""
    layers = {
        name: LayerLatency('conv', SHAPES[name], 0, 100.0, times)
        for name, times in (('a.weight', a), ('b.weight', b))
    }
    profile = LatencyProfile({}, {'conv': kind or KindLatency()}, layers, surplus)
    costs = {'latency': Latency(profile)}
    return CostTable(SHAPES, PROFILES, [GROUP], costs)


@pytest.mark.parametrize(
    ('kind', 'removed', 'expected'),
    [
        (KindLatency(), 0, 16.0),
        # 24 of 32: 1 + 2 · 3/4 + 5 · 3/4 and 8 · 3/4
        (KindLatency(), 8, 6.25 + 6.0),
        # 25 count as 32 where they are put out, not where they are read: 8 · 25/32
        (KindLatency((1, 16)), 7, 8.0 + 6.25),
        (KindLatency((1, 16)), 16, 4.5 + 4.0),
        # 18 = 2 · 9 of 32 is twice as slow to read: 8 · 18/32 · 2
        (KindLatency((1, 1), (BROKEN, PLAIN)), 14, 1 + 7 * 18 / 32 + 9.0),
        # and 17 is thrice as slow to put out: 3 · (1 + 7 · 17/32)
        (KindLatency((1, 1), (PLAIN, BROKEN)), 15, 3 * (1 + 7 * 17 / 32) + 4.25),
        # full widths have no factor, whatever divides them
        (KindLatency((1, 1), ((9.0,) * 6,) * 2), 0, 16.0),
    ],
)
def test_the_time_of_a_width(kind, removed, expected):
    totals = table(kind=kind).totals(np.array([removed]))
    assert totals['latency'] == pytest.approx(expected)


def test_narrow_layers_have_no_surplus():
    """At half the channels of both, 3/4 of the surplus is gone: 8.5 · (1 - 0.15)."""
    costs = table(surplus=0.2)
    assert costs.totals(np.array([0]))['latency'] == pytest.approx(16)
    assert costs.totals(np.array([16]))['latency'] == pytest.approx(8.5 * 0.85)
    # Savings have the same slope, but for the least one: 1 % of the layers' time.
    smooth = costs.count_smoothly(costs.sizes_without(np.array([16])), slice(None))
    row = list(costs.counters).index('latency')
    assert smooth[row].sum() == pytest.approx(8.5 * 0.85 + 0.01 * 16 / 2)


def test_without_a_profile_there_is_no_latency():
    plain = CostTable(SHAPES, PROFILES, [GROUP])
    assert list(plain.counters) == ['macs', 'memory', 'params']
    assert list(plain.totals(np.zeros(1)).values) == ['macs', 'memory', 'params']


@pytest.mark.parametrize('steps', [(1, 1), (16, 16)])
@pytest.mark.parametrize('units', [1, 8])
def test_savings_are_a_slope(steps, units):
    """With and without steps; a hundredth of each layer goes by its MACs besides."""
    kind = KindLatency(steps, (BROKEN, BROKEN))
    running = RunningCosts(table(kind=kind), np.zeros(1), np.array([units]))
    expected = units / 32 * (7 + 8 + 2 * 0.08)
    assert running.savings('latency') == pytest.approx([expected])
    running.remove(0, 8, units)  # 24 remain; the slopes are the same
    assert running.savings('latency') == pytest.approx([expected])
    assert running.totals['latency'] == table(kind=kind).totals([8])['latency']


def test_a_layer_that_seems_to_save_nothing_still_has_a_slope():
    running = RunningCosts(table(a=(8, 0, 0, 0), b=(8, 0, 0, 0)), np.zeros(1))
    assert running.savings('latency') == pytest.approx([2 * 0.08 / 32])
    assert running.totals['latency'] == 16


def two_chains(slow):
    """Two groups alike, but for the times of their layers in milliseconds."""
    shapes, groups, layers = {}, [], {}
    for chain, time in zip('xy', slow, strict=True):
        names = {f'{chain}{n.removesuffix(".weight")}.weight': n for n in PROFILES}
        shapes |= {new: SHAPES[n] for new, n in names.items()}
        make, read = names
        members = (Member(make, 0, INDEX, 'out'), Member(read, 1, INDEX, 'in'))
        groups.append(ChannelGroup(chain, members))
        for name in names:
            times = (0.0, 0.0, 0.0, time)
            layers[name] = LayerLatency('conv', shapes[name], 0, 100.0, times)
    profile = LatencyProfile({}, {'conv': KindLatency((16, 16))}, layers)
    profiles = {name: LayerProfile(100.0, 100.0) for name in shapes}
    return CostTable(shapes, profiles, groups, {'latency': Latency(profile)})


@pytest.mark.parametrize('divisor', [1, 8])
@pytest.mark.parametrize(('normalize', 'first'), [('latency', 1), ('macs', 0)])
def test_decisions_go_where_time_is_saved(divisor, normalize, first):
    """y's units matter twice as much, and take three times as long."""
    costs = two_chains((1.0, 3.0))
    importance = np.repeat([1.0, 2.0], 32)
    group_of = np.repeat([0, 1], 32)
    units = select_units(
        importance,
        group_of,
        np.ones(64, dtype=bool),
        costs,
        Limits.of(np.array([32, 32]), np.ones(2, dtype=int), divisor=divisor),
        normalize,
        lambda now: now['latency'] <= 6,
    )
    if normalize == 'latency':  # 16 of y: its two layers fall from 6 ms to 3 ms
        assert units.tolist() == list(range(32, 48))
    else:  # x first: of 2 ms nothing remains but its last unit or eight
        assert group_of[units].tolist()[:24] == [first] * 24


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        (KindLatency(), 1),
        (KindLatency((16, 16)), 1),
        (KindLatency((1, 1), (BROKEN, PLAIN)), 4),
        (KindLatency((1, 1), (PLAIN, (9, 9, 9, 9, 1, 1))), 16),
        # what an odd width costs more is less than what its neighbour has more
        (KindLatency((1, 1), ((1.001, *PLAIN[1:]), PLAIN)), 1),
    ],
)
def test_the_best_divisor(kind, expected):
    sizes, widths = np.array([32]), np.array([1])
    assert best_divisor(table(kind=kind), sizes, widths) == expected


def profile(**origin):
    return made_up(SHAPES, PROFILES, origin)


def test_files_hold_everything(tmp_path):
    kind = KindLatency((16, 8), (BROKEN, PLAIN))
    written = replace(made_up(SHAPES, PROFILES, conv=kind), surplus=0.125)
    read = LatencyProfile.load(write(written, tmp_path / 'table.json'))
    assert read == written
    assert read.digest == written.digest != profile(version='10').digest
    assert read.runtime == 'onnxruntime 9.9, cpu, 1 thread'


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (None, 'a readable JSON file'),
        ('{', 'a readable JSON file'),
        ('[]', 'a profile of version 1'),
        ('{"version": 9}', r'a profile of version 1 \(got .*: 9\)'),
        ('{"version": 1, "fit": null, "cuts": [1, 2]}', 'ends after 2 cuts'),
        ('{"version": 1, "origin": {}, "fit": {"kinds": 3}}', 'a latency profile'),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, words):
    path = tmp_path / 'table.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf'{words}.*tools/profile_latency\.py'):
        LatencyProfile.load(path)


@pytest.mark.parametrize('bad', [5, None, [3, 64], ['a', 'b', 'c'], [3, 0, 64]])
def test_origins_name_the_size(bad, tmp_path):
    for origin in (bad, {'input_shape': bad}):
        with pytest.raises(ConfigError, match='a latency profile'):
            LatencyProfile.from_dict(origin, profile().to_dict())
    with pytest.raises(ConfigError, match='a readable JSON file'):
        LatencyProfile.load(5)


@pytest.mark.parametrize('bad', [0.0, float('nan'), float('inf'), -2.0])
def test_positions_and_factors_are_above_zero(bad):
    data = json.loads(json.dumps(profile().to_dict()))
    data['layers']['a.weight']['positions'] = bad
    with pytest.raises(ConfigError, match='positions'):
        LatencyProfile.from_dict(profile().origin, data)
    if bad == 0:
        data = json.loads(json.dumps(profile().to_dict()))
        data['kinds']['conv']['factors'][1][3] = bad
        with pytest.raises(ConfigError, match='a factor of 0'):
            LatencyProfile.from_dict(profile().origin, data)


@pytest.mark.parametrize('bad', [-0.1, 1.0, float('nan'), 'x'])
def test_a_surplus_is_a_share(bad):
    data = profile().to_dict() | {'surplus': bad}
    with pytest.raises(ConfigError, match='a latency profile'):
        LatencyProfile.from_dict(profile().origin, data)
    del data['surplus']  # a file from before there was one
    assert LatencyProfile.from_dict(profile().origin, data).surplus == 0


@pytest.mark.parametrize('bad', [-1.0, float('nan'), 'x'])
def test_times_are_numbers_of_at_least_zero(bad):
    data = json.loads(json.dumps(profile().to_dict()))
    data['layers']['a.weight']['times'][1] = bad
    with pytest.raises(ConfigError, match='a latency profile'):
        LatencyProfile.from_dict(profile().origin, data)


def test_another_model_or_size_is_refused():
    good = profile()
    good.check_fits(SHAPES, PROFILES)
    with pytest.raises(ConfigError, match=r'a.weight is \(16, 8, 1, 1\) \(got \(32,'):
        good.check_fits(SHAPES | {'a.weight': (16, 8, 1, 1)}, PROFILES)
    larger = {n: LayerProfile(400.0, 400.0) for n in PROFILES}
    with pytest.raises(ConfigError, match=r'a.weight is used 400 times \(got 100 in'):
        good.check_fits(SHAPES, larger)
    shapes = SHAPES | {'c.weight': (4, 4)}
    with pytest.raises(ConfigError, match='one with c.weight'):
        good.check_fits(shapes, PROFILES | {'c.weight': LayerProfile(1.0, 1.0)})


@pytest.mark.parametrize(
    'options',
    [dict(target=dict(latency=0.5)), dict(normalize='latency'), dict(divisor='auto')],
)
def test_latency_needs_a_profile(tmp_path, options):
    words = r'latency_profile must be .*\(got None\);.*tools/profile_latency.py CONFIG'
    with pytest.raises(ConfigError, match=words):
        PruningConfig(**options)
    path = write(profile(), tmp_path / 'table.json')
    config = PruningConfig(latency_profile=path, **options)
    assert config.input_shape == (3, 64, 64)
    assert list(config.costs) == ['latency']


def test_another_input_shape_is_refused(tmp_path):
    path = write(profile(), tmp_path / 'table.json')
    with pytest.raises(ConfigError, match=r'input_shape must be \(3, 64, 64\)'):
        PruningConfig(latency_profile=path, input_shape=(3, 32, 32))
