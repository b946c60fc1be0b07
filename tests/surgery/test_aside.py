"""Columns kept aside: values out of a weight and back, where two dimensions overlap."""

import numpy as np
import pytest
import torch
from torch import nn

from mmgfp.groups import ChannelGroup, Member
from mmgfp.surgery.aside import ColumnsAside
from mmgfp.surgery.masking import ColumnMask
from mmgfp.utils.errors import ConfigError


def square():
    """A weight (2, 3) of ones to sixes; units 0 and 1 are its rows, 2 to 4 columns."""
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.arange(1.0, 7).reshape(2, 3)
    members = [
        Member('weight', dim, np.arange(size).reshape(-1, 1), 'in')
        for dim, size in enumerate((2, 3))
    ]
    groups = [ChannelGroup(f'dim {m.dim}', (m,)) for m in members]
    return layer, ColumnMask(layer, groups, recover=True)


def keep(*units):
    return np.isin(np.arange(5), units)


ORDERS = [
    # Row 1 and column 2 cross in 6, which comes back with the last of the two.
    ([keep(0, 1, 2, 3), keep(0, 2, 3)], keep(0, 1, 2, 3), [[1, 2, 0], [4, 5, 0]]),
    ([keep(0, 1, 2, 3), keep(0, 2, 3)], keep(0, 2, 3, 4), [[1, 2, 3], [0, 0, 0]]),
    ([keep(0, 2, 3)], keep(0, 1, 2, 3), [[1, 2, 0], [4, 5, 0]]),
    # Both at once, and one of them for another.
    ([keep(0, 2, 3)], keep(0, 1, 2, 3, 4), [[1, 2, 3], [4, 5, 6]]),
    ([keep(0, 2, 3)], keep(1, 2, 4), [[0, 0, 0], [4, 0, 6]]),
]


@pytest.mark.parametrize(('before', 'after', 'expected'), ORDERS)
def test_values_come_back_where_nothing_masks_them(before, after, expected):
    layer, mask = square()
    for kept in before:
        mask.update(kept)
    mask.update(after)
    assert layer.weight.tolist() == expected
    mask.update(keep(*range(5)))
    assert layer.weight.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not mask.aside.values['weight'].any()


def test_what_the_optimizer_moves_is_not_kept():
    layer, mask = square()
    mask.update(keep(0, 1, 2, 3))
    layer.weight.data += 10  # as by momentum; nothing is masked again yet
    mask.update(keep(0, 1, 3))
    assert layer.weight.tolist() == [[0, 12, 0], [0, 15, 0]]
    mask.update(keep(*range(5)))
    assert layer.weight.tolist() == [[11, 12, 3], [14, 15, 6]]


def test_columns_are_those_of_masked_entries():
    _, mask = square()
    assert mask.aside.columns('weight', 1) is None
    mask.update(keep(0, 1, 3))
    entries, columns = mask.aside.columns('weight', 1)
    assert entries.tolist() == [0, 2] and columns.tolist() == [[1, 3], [4, 6]]


def test_without_recover_nothing_is_kept():
    layer = nn.Linear(3, 2, bias=False)
    reader = Member('weight', 1, np.array([[0], [1], [2]]), 'in')
    mask = ColumnMask(layer, [ChannelGroup('inputs', (reader,))])
    mask.update(np.array([True, False, True]))
    mask.update(np.ones(3, dtype=bool))
    assert mask.aside is None and not layer.weight[:, 1].any()


def test_state_of_another_model_is_refused():
    _, mask = square()
    with pytest.raises(ConfigError, match=r'kept aside .* \(got weight of \(1, 3\)\)'):
        mask.aside.load_state_dict({'weight': torch.zeros(1, 3)})
    with pytest.raises(ConfigError, match='got head'):
        mask.aside.load_state_dict({'head': torch.zeros(1, 3)})


def test_state_is_a_copy():
    layer, mask = square()
    mask.update(keep(0, 1, 3))
    state = mask.aside.state_dict()
    mask.update(keep(*range(5)))
    other = ColumnsAside(dict(layer.named_parameters()), {})
    other.load_state_dict(state)
    assert other.values['weight'].tolist() == [[1, 0, 3], [4, 0, 6]]
    assert not mask.aside.values['weight'].any()
