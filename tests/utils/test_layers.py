"""Layers and their names."""

import pytest

from mmgfp.utils.layers import matches


@pytest.mark.parametrize(
    ('layer', 'pattern', 'fits'),
    [
        ('neck.conv', 'neck', True),
        ('neck.conv', 'neck.conv', True),
        ('neck.conv', 'neck.*', True),
        ('necklace.conv', 'neck', False),
        ('head.neck.conv', 'neck', False),
        ('head.neck.conv', '*.neck.conv', True),
    ],
)
def test_matches(layer, pattern, fits):
    assert matches(layer, pattern) == fits
