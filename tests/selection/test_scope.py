"""Local scope, worked out by hand: groups lose units in proportion to their shares."""

import json

import numpy as np
import pytest
from support.pruning import hooks_on
from support.toys import Net, conv, toy_loss

from mmgfp import ChannelPruner, PruningConfig
from mmgfp.groups import ChannelGroup, Member
from mmgfp.selection.costs import CostTable, LayerProfile
from mmgfp.selection.greedy import Limits, select_units
from mmgfp.selection.scope import group_shares, read_ratios
from mmgfp.utils.errors import ConfigError


def pick(importance, sizes, shares, count=99, kept=None, **options):
    """Units that go, of groups of so many units, one channel each."""
    sizes = np.array(sizes)
    shapes = {f'{g}.weight': (n, 1) for g, n in enumerate(sizes)}
    groups = [
        ChannelGroup(name, (Member(name, 0, np.arange(n)[:, None], 'out'),))
        for name, (n, _) in shapes.items()
    ]
    costs = CostTable(shapes, {n: LayerProfile(1, 1) for n in shapes}, groups)
    shares = None if shares is None else np.array(shares, dtype=float)
    limits = Limits.of(sizes, np.ones_like(sizes), shares=shares, **options)
    units = select_units(
        np.array(importance, dtype=float),
        np.repeat(np.arange(len(sizes)), sizes),
        np.ones(sizes.sum(), dtype=bool) if kept is None else np.array(kept),
        costs,
        limits,
        'none',
        lambda now: False,
        count,
    )
    return units.tolist()


#: Groups of four units and of two.
TWO = [4, 2, 3, 1, 9, 8], [4, 2]


def test_equal_shares():
    # Half a unit more is due at 1/8 and 1/4 of the way, then at 3/8 and 3/4. One unit
    # of each always stays.
    assert pick(*TWO, [1, 1]) == [3, 5, 1, 2]
    assert pick(*TWO, None) == [3, 1, 2, 5]


def test_shares_of_groups_are_the_pace_and_the_limit():
    # The way is 2 units of 4, and 1 of 2: due at 1/4 and 1/2, then at 3/4.
    assert pick(*TWO, [0.5, 0.5]) == [3, 5, 1]
    # 1 of 4: due at 1/2; of the other group as before.
    assert pick(*TWO, [0.25, 1]) == [5, 3]
    assert pick(*TWO, [0, 0.5]) == [5]
    # 0.7 of 4 are 2.8: two units.
    assert pick(*TWO, [0.7, 0]) == [3, 1]


def test_earlier_decisions_count():
    kept = [True, False, True, False, True, True]
    # Two of four are gone, the next one is due at 5/8; the other group's at 1/4.
    assert pick(*TWO, [1, 1], 1, kept) == [5]


def test_bundles_are_due_at_their_middle():
    # Bundles of 4 of 8: due at 2 / 4 of the way to half, and at 2 / 8 of that to all,
    # which ends at 4 units; the next 4 of these never go.
    importance = [*range(8, 16), *range(8)]
    expected = [8, 9, 10, 11, 0, 1, 2, 3]
    assert pick(importance, [8, 8], [0.5, 1], divisor=4) == expected


def test_other_limits_hold():
    assert pick(*TWO, [1, 1], max_ratio=0.5) == [3, 5, 1]
    assert pick(*TWO, [1, 1], min_channels=2) == [3, 1]
    # Nothing is known of the second group.
    assert pick([4, 2, 3, 1, np.nan, np.nan], [4, 2], [1, 1]) == [3, 1, 2]


def test_large_groups_keep_step():
    rng = np.random.default_rng(0)
    sizes, shares = [640, 32, 100], [0.5, 0.25, 0.8]
    gone = pick(rng.random(772), sizes, shares, 204)
    counts = np.bincount(np.repeat([0, 1, 2], sizes)[gone])
    # 204 of 320 + 8 + 80 units are half the way.
    assert counts.tolist() == [160, 4, 40]


# -- options ------------------------------------------------------------------


def test_names_go_before_patterns_and_the_first_pattern_counts():
    ratios = {'*': 0.1, 'a.*': 0.2, 'a.b': 0.3}
    names = ['a.b', 'a.c', 'd']
    assert group_shares('local', ratios, names).tolist() == [0.3, 0.1, 0.1]
    del ratios['*']
    assert group_shares('local', ratios, names).tolist() == [0.3, 0.2, 0]
    assert group_shares('global', None, names) is None


def test_ratios_from_a_file(tmp_path):
    path = tmp_path / 'ratios.json'
    path.write_text(json.dumps({'ratios': {'a': 0.5}, 'metric': 'bbox_mAP'}))
    config = PruningConfig(scope='local', ratios=str(path))
    assert config.ratios == {'a': 0.5}
    path.unlink()  # it has been read
    assert PruningConfig.of(config, interval=3).ratios == {'a': 0.5}


@pytest.mark.parametrize(
    ('scope', 'ratios', 'match'),
    [
        ('group', None, "scope must be 'global' or 'local' .*got 'group'"),
        ('global', {'a': 0.5}, r"ratios need scope='local'.*got scope='global'.*drop"),
        ('local', {'a': 1.5}, r"shares in \[0, 1\] by names.*got 'a': 1.5"),
        ('local', {'a': True}, "got 'a': True"),
        ('local', {}, r'with some entries \(got {}\)'),
        ('local', 0.5, 'a dict of shares by names of groups'),
        ('local', 'missing.json', 'ratios in missing.json must be a JSON file'),
    ],
)
def test_bad_ratios(scope, ratios, match):
    with pytest.raises(ConfigError, match=match):
        PruningConfig(scope=scope, ratios=ratios)


@pytest.mark.parametrize('text', ['{"a": 0.5}', '[1]', '{"ratios": {"a": "b"}}', '{'])
def test_bad_files(tmp_path, text):
    (tmp_path / 'ratios.json').write_text(text)
    with pytest.raises(ConfigError, match=r'ratios in .*ratios\.json must be'):
        read_ratios('local', tmp_path / 'ratios.json')


# -- runs ---------------------------------------------------------------------


def chain():
    """Groups of 16, 8 and 4 units."""
    layers = dict(a=conv(3, 16), b=conv(16, 8), c=conv(8, 4), d=conv(4, 2))
    return Net(lambda n, x: n.d(n.c(n.b(n.a(x)))), **layers)


def pruner_of_chain(**options):
    pruner = ChannelPruner(
        chain(), criterion='l1', interval=1, scope='local', **options
    )
    pruner.prepare(toy_loss, toy_loss, 2)
    return pruner


def decided(pruner, decisions=1):
    for _ in range(decisions):
        pruner.step()
    return pruner.units.removed.tolist()


@pytest.mark.parametrize('schedule', ['one_shot', dict(type='linear', iterations=3)])
def test_target_ends_the_way_wherever_the_groups_are(schedule):
    # Half of all: 8, 4 and 2 channels have 3·8 + 8·4 + 4·2 + 2·2 = 68 of 216 kernels.
    # With one unit of the first group more, it has 3·9 + 9·4 + 4·2 + 2·2 = 75.
    pruner = pruner_of_chain(target=dict(flops=68 / 216), schedule=schedule)
    assert decided(pruner, 1 if schedule == 'one_shot' else 3) == [8, 4, 2]
    assert pruner.done
    pruner = pruner_of_chain(target=dict(flops=75 / 216), schedule=schedule)
    assert decided(pruner, 1 if schedule == 'one_shot' else 3) == [7, 4, 2]


def test_ratios_that_miss_the_target_are_refused_with_the_reason():
    # All of a and c stay: 3·16 + 16·4 + 4·4 + 4·2 = 136 of 216 kernels, 0.6296.
    net = chain()
    pruner = ChannelPruner(
        net, scope='local', ratios={'b': 0.5}, target=dict(flops=0.62)
    )
    with pytest.raises(ConfigError, match=r'at least 0\.63, .*go with ratios$'):
        pruner.prepare(toy_loss, toy_loss, 2)
    assert hooks_on(net) == 0
    pruner = pruner_of_chain(
        ratios={'b': 0.5}, target=dict(flops=0.63), schedule='one_shot'
    )
    assert decided(pruner) == [0, 4, 0]


def test_ratios_of_unknown_groups_are_refused():
    with pytest.raises(
        ConfigError, match=r"groups that the model has \(got 'bb'\).*'b'"
    ):
        pruner_of_chain(ratios={'bb': 0.5})


def test_resumed_run_goes_on_in_step():
    options = dict(ratios={'*': 0.75}, target=dict(flops=0.15), units_per_step=2)
    whole, first = pruner_of_chain(**options), pruner_of_chain(**options)
    second = ChannelPruner(chain(), first.config)
    decided(first, 3)
    second.load_state_dict(first.state_dict())
    assert decided(second, 4) == decided(whole, 7) == [8, 4, 2]
