"""Which groups the divisor keeps whole, worked out by hand."""

import numpy as np
import pytest

from mmgfp.groups import ChannelGroup, Grouping, Member, ResidualBlock
from mmgfp.selection.greedy import Limits
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.surgery.structure import PruneStructure

#: Units of each group, and channels of one unit of it.
GROUPS = {'a': (5, 1), 'b': (8, 1), 'c': (9, 1), 'heads': (2, 4), 'wide': (3, 8)}


def grouping(*blocks):
    groups = [
        ChannelGroup(name, (Member(name, 0, np.zeros((units, width), int), 'out'),))
        for name, (units, width) in GROUPS.items()
    ]
    return Grouping(tuple(groups), (), {}, blocks)


@pytest.mark.parametrize(
    ('divisor', 'options', 'names'),
    [
        (1, {}, ()),
        (4, {}, ()),  # of 5 channels one can go
        (8, {}, ('a', 'b', 'heads')),
        (16, {}, ('a', 'b', 'c', 'heads')),  # of 3 units of 8 channels, one can go
        # Half of 9 channels stay in any case, which is no reason to stay at 8 of 8.
        (8, dict(max_ratio=0.5), ('a', 'b', 'heads')),
        # 9 channels stay in any case: of c, all; of the others, the divisor decides.
        (8, dict(min_channels=9), ()),
        # 5 of 8 channels could stay, which is no multiple.
        (4, dict(min_channels=5), ('b',)),
        # What a share of nothing keeps is not the divisor's.
        (8, dict(shares=np.array([0, 1, 1, 1, 1])), ('b', 'heads')),
    ],
)
@pytest.mark.parametrize('blocks', [(), (ResidualBlock('wide', 'wide.bn'),)])
def test_the_divisor_alone_is_the_reason(divisor, options, names, blocks):
    sizes, widths = np.array([*GROUPS.values()]).T
    limits = Limits.of(sizes, widths, divisor=divisor, **options)
    limits = limits.with_blocks([[] for _ in blocks])
    assert NarrowGroups.of(limits, grouping(*blocks)) == NarrowGroups(divisor, names)


def test_groups_that_are_gone_are_not_named():
    sizes, widths = np.array([*GROUPS.values()]).T
    limits = Limits.of(sizes, widths, divisor=8)
    kept = np.ones(sizes.sum(), bool)
    kept[:5] = False  # all of a
    kept[5:7] = False  # some of b
    assert NarrowGroups.of(limits, grouping(), kept).names == ('b', 'heads')


def test_groups_of_modules_that_are_gone_are_not_named():
    structure = PruneStructure(identities=('neck.extra',))
    narrow = NarrowGroups(8, ('neck.extra.conv', 'neck.extras.conv', 'neck.extra.out'))
    left = narrow.left_in(structure, {})
    assert left.names == ('neck.extras.conv',)
    # Another member makes the last one, too.
    members = {'neck.extra.out': ['neck.extra.out.weight', 'head.weight']}
    left = narrow.left_in(structure, members)
    assert left.names == ('neck.extras.conv', 'neck.extra.out')


def test_a_line_is_short_and_names_the_remedy():
    few = NarrowGroups(8, ('a',)).text
    assert few == (
        '1 group is too narrow to lose channels under divisor=8: a; a smaller divisor '
        'lets it, divisor=1 in any case'
    )
    many = NarrowGroups(4, tuple('abcdef')).text
    assert many.startswith('6 groups are ') and ': a, b, c, d and 2 more;' in many
    assert NarrowGroups(8, ()).text == ''
