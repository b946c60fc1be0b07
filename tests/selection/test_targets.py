"""Targets that cannot be reached are refused with what is in the way."""

import pytest

from mmgfp.config import PruningConfig
from mmgfp.selection.costs import Totals
from mmgfp.selection.targets import Target, check_reachable, least_ratio
from mmgfp.utils.errors import ConfigError

FULL = Totals({'macs': 1000, 'latency': 10.0})
HALF = Totals({'macs': 500, 'latency': 5.0})


@pytest.mark.parametrize(
    ('target', 'limits', 'finer', 'remedy'),
    [
        (dict(flops=0.4), [], None, 'raise it'),
        (dict(flops=0.4), ['keep'], None, 'raise it, or let more go with keep'),
        (
            dict(flops=0.4),
            ['keep'],
            399,
            'raise it, or give a smaller divisor: divisor=1 leaves 0.399',
        ),
        # A smaller divisor alone would not do.
        (
            dict(flops=0.4),
            ['keep', 'max_ratio'],
            401,
            'raise it, or let more go with keep, max_ratio and divisor',
        ),
        # What is measured may be lower at wider groups.
        (
            dict(latency=0.4),
            [],
            399,
            "raise it, or let more go with divisor='auto'",
        ),
    ],
)
def test_the_remedy_names_what_is_in_the_way(target, limits, finer, remedy):
    finer = finer and Totals({'macs': finer, 'latency': finer / 100})
    with pytest.raises(ConfigError, match=r'at least 0\.5, .*\(got 0\.4\)') as refused:
        check_reachable([Target.parse(target)], HALF, FULL, limits, finer)
    assert str(refused.value).partition('; ')[2] == remedy


def test_what_was_chosen_by_a_profile_is_no_remedy():
    target = [Target('latency', 0.4)]
    with pytest.raises(ConfigError, match='; raise it$'):
        check_reachable(target, HALF, FULL, [], HALF, is_auto=True)


def test_a_target_at_the_limit_is_taken():
    check_reachable([Target('flops', 0.5)], HALF, FULL)
    # Rounded up, so that it can be reached.
    assert least_ratio('flops', Totals({'macs': 500.4}), FULL) == 0.501


def test_options_that_limit_are_those_in_force():
    assert PruningConfig(divisor=8).limiting == []
    options = dict(keep=['head'], coupled=False, min_channels=2, max_ratio=0.9)
    assert PruningConfig(**options).limiting == [*options]
    assert PruningConfig(scope='local', ratios={'a': 0.5}).limiting == ['ratios']
