"""Code that splits channels: a fixed number of parts, or parts of a fixed width.

All nets split 16 channels into 4 times 4, so that sizes alone tell nothing.
"""

from functools import partial

import numpy as np
import pytest
import torch
from support.toys import Net, conv, images, reasons_of, toy_forward, toy_loss
from torch import nn

from mmgfp.discovery.comparing import difference
from mmgfp.discovery.discover import discover
from mmgfp.discovery.verify import masked_and_compact
from mmgfp.tracing.splits import Split, Splits
from mmgfp.utils.errors import TraceError

#: Unit i is part i: channels 4 i to 4 i + 3.
PARTS = [[4 * i + j for j in range(4)] for i in range(4)]
#: Unit i is channel i of each part: i, 4 + i, 8 + i, 12 + i.
ACROSS = [[4 * j + i for j in range(4)] for i in range(4)]
#: Unit i is what the part has become.
ONE = [[0], [1], [2], [3]]


def split_of(fixed, x):
    """x (N, C, ...) as (N, parts, width, ...), of fixed width or number of parts."""
    sizes = (x.shape[1] // 4, 4) if fixed == 'width' else (4, x.shape[1] // 4)
    return x.view(len(x), *sizes, *x.shape[2:])


def shuffled(fixed, net, x):
    x = net.a(x).relu()
    return net.b(split_of(fixed, x).transpose(1, 2).reshape(x.shape))


def squeezed(fixed, net, x):
    """The largest of the channels that stand along the fixed dimension."""
    return net.b(split_of(fixed, net.a(x)).amax(2 if fixed == 'width' else 1))


def weighted(fixed, net, x):
    x = net.a(x).relu()
    parts = split_of(fixed, x)
    weights = parts.mean((3, 4), keepdim=True).softmax(2 if fixed == 'width' else 1)
    return net.b((parts * weights).view(x.shape))


def normalised(fixed, net, x):
    """A group norm without parameters, which only whole groups can leave."""
    x = net.a(x)
    parts = split_of(fixed, x).flatten(2)
    parts = parts - parts.mean(2, keepdim=True)
    parts = parts / (parts.square().mean(2, keepdim=True) + 1).sqrt()
    return net.b(parts.view(x.shape).relu())


def pixels(net, x):
    """Each four channels become 2 x 2 positions."""
    x = net.a(x).relu()
    n, c, h, w = x.shape
    x = x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return net.b(x.reshape(n, c // 4, 2 * h, 2 * w))


def vectors(fixed, net, x):
    """As `squeezed`, of vectors (N, C)."""
    return net.b(split_of(fixed, net.a(x.mean((2, 3)))).amax(2 - (fixed != 'width')))


def attention(net, x):
    """Self-attention of heads of 4 channels, whose number the widths tell."""
    x = net.stem(x).flatten(2).transpose(1, 2)

    def heads(layer):
        y = layer(x)
        return y.view(*y.shape[:2], y.shape[2] // 4, 4).transpose(1, 2)

    attended = (heads(net.q) @ heads(net.k).mT).softmax(-1) @ heads(net.v)
    return net.b(attended.transpose(1, 2).flatten(2))


def packed_attention(net, x):
    """The same, with one layer for queries, keys and values."""
    x = net.stem(x).flatten(2).transpose(1, 2)
    y = net.a(x)
    y = y.view(*y.shape[:2], 3, y.shape[2] // 12, 4).permute(2, 0, 3, 1, 4)
    attended = (y[0] @ y[1].mT).softmax(-1) @ y[2]
    return net.b(attended.transpose(1, 2).flatten(2))


def build(run, reads, **parts):
    torch.manual_seed(0)
    layers = parts or {'a': conv(3, 16), 'b': conv(reads, 4)}
    return Net(run, **layers)


def found(net, **options):
    return discover(net, toy_loss, toy_forward, 2, **options).grouping


#: Net, and the channels of each unit, by weight and dimension.
CASES = {
    **{
        f'{run.__name__} {fixed}': (
            partial(build, partial(run, fixed), 16 if reads is None else 4),
            {('a', 0): units, ('b', 1): reads or others},
        )
        for run, reads in ((shuffled, None), (squeezed, ONE))
        for fixed, units, others in (
            ('width', PARTS, ACROSS),
            ('number', ACROSS, PARTS),
        )
    },
    'weighted width': (
        partial(build, partial(weighted, 'width'), 16),
        {('a', 0): PARTS, ('b', 1): PARTS},
    ),
    'weighted number': (
        partial(build, partial(weighted, 'number'), 16),
        {('a', 0): ACROSS, ('b', 1): ACROSS},
    ),
    'normalised width': (
        partial(build, partial(normalised, 'width'), 16),
        {('a', 0): PARTS, ('b', 1): PARTS},
    ),
    'pixels': (partial(build, pixels, 4), {('a', 0): PARTS, ('b', 1): ONE}),
    'vectors width': (
        lambda: build(
            partial(vectors, 'width'), 4, a=nn.Linear(3, 16), b=nn.Linear(4, 4)
        ),
        {('a', 0): PARTS, ('b', 1): ONE},
    ),
    'vectors number': (
        lambda: build(
            partial(vectors, 'number'), 4, a=nn.Linear(3, 16), b=nn.Linear(4, 4)
        ),
        {('a', 0): ACROSS, ('b', 1): ONE},
    ),
    'attention': (
        lambda: build(
            attention,
            16,
            stem=conv(3, 8),
            **{name: nn.Linear(8, 16) for name in 'qkv'},
            b=nn.Linear(16, 4),
        ),
        {(name, 0): PARTS for name in 'qkv'} | {('b', 1): PARTS},
    ),
    'packed attention': (
        lambda: build(
            packed_attention,
            16,
            stem=conv(3, 8),
            a=nn.Linear(8, 48),
            b=nn.Linear(16, 4),
        ),
        {
            ('a', 0): [[16 * k + c for k in range(3) for c in part] for part in PARTS],
            ('b', 1): PARTS,
        },
    ),
}


@pytest.mark.parametrize(('make', 'expected'), CASES.values(), ids=CASES)
def test_units_follow_what_the_code_fixes(make, expected):
    net = make()
    grouping = found(net)
    group = next(g for g in grouping.groups if g.units == 4)
    weights = {
        (m.name.removesuffix('.weight'), m.dim): m.index.tolist()
        for m in group.members
        if m.name.endswith('.weight')
    }
    assert weights == expected
    # All that verification has not drawn: any one unit, and all but any one.
    net.double().eval()
    for unit in range(4):
        for others in (False, True):
            kept = np.full(4, not others)
            kept[unit] = others
            masked, small = masked_and_compact(net, [group], kept)
            x = images().double()
            with torch.no_grad():
                assert difference(masked(x), small(x)) < 1e-9


def test_both_kinds_in_one_net():
    """The two are alike but for their code; each gets its own reading."""

    def run(net, x):
        first = shuffled('width', net.first, x)
        return shuffled('number', net.second, first)

    def part(c_in):
        return Net(None, a=conv(c_in, 16), b=conv(16, 5))

    grouping = found(build(run, 0, first=part(3), second=part(5)))
    units = {g.name: g.members[0].index.tolist() for g in grouping.groups}
    assert units['first.a'] == PARTS and units['second.a'] == ACROSS


def fixed_sizes(net, x):
    x = net.a(x).relu()
    return net.b(x.view(2, 4, 4, 8, 8).transpose(1, 2).reshape(2, 16, 8, 8))


@pytest.mark.parametrize(
    ('run', 'reason'),
    [
        (fixed_sizes, 'masked and compact disagree: RuntimeError: shape'),
        (partial(normalised, 'number'), 'channels are reduced, before any mask'),
    ],
)
def test_channels_stay_where_no_reading_is_right(run, reason):
    """The reason is that of the default reading, and all else can go."""
    net = build(run, 16)
    net.c = conv(4, 3)
    net.run = lambda n, x: n.c(run(n, x).relu())
    grouping = found(net)
    assert [g.name for g in grouping.groups] == ['b']
    assert reasons_of(grouping)['a'].startswith(reason)


def test_strict_refuses_only_what_no_reading_fits():
    found(build(partial(shuffled, 'width'), 16), strict=True)
    with pytest.raises(TraceError, match='name these layers in keep'):
        found(build(fixed_sizes, 16), strict=True)


def test_a_split_has_one_default_and_others():
    assert Split(('a',), (4, 8)).default == 1
    assert Split(('a',), (3, 4, 8)).others == [0, 1]
    vectors = Split(('a',), (4, 8), rows=False)
    assert vectors.default is None and vectors.others == [0, 1]
    splits = Splits({vectors: 0})
    assert splits.read(vectors, torch.tensor([[3, -1]])) == 0
    assert splits.read(vectors, torch.tensor([[2, 3]])) == 0
    assert splits.labels[vectors].tolist() == [2, 3]
