"""Values in types that weights-only files hold, compared by what they hold."""

from __future__ import annotations

import re
from textwrap import shorten
from typing import Any

import numpy as np
import torch

_ADDRESS = re.compile(r' at 0x[0-9a-f]+')


def plain(value: Any) -> Any:
    """Return ``value`` made of types that a weights-only checkpoint may hold.

    Examples:
        >>> from pathlib import Path
        >>> plain({'classes': ('cat', 'dog'), 1: np.float32(0.5), 'path': Path('a/b')})
        {'classes': ('cat', 'dog'), '1': 0.5, 'path': 'a/b'}
        >>> plain([object()])
        ['<object object>']
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        # Not the type itself: subclasses are not plain.
        return (tuple if isinstance(value, tuple) else list)(plain(v) for v in value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    return _ADDRESS.sub('', str(value))  # it would be another one in each process


def same(first: Any, second: Any) -> bool:
    """Return whether two values hold the same, once they are `plain`.

    NaN is the same as NaN, a list as a tuple, a tensor as a list or an array; it does
    not matter where a tensor is.

    Examples:
        >>> same({'by': torch.tensor([1.0, 2.0])}, {'by': np.array([1.0, 2.0])})
        True
        >>> same((1, float('nan')), [1, 2])
        False
    """
    first, second = (
        plain(x.tolist() if isinstance(x, torch.Tensor) else x) for x in (first, second)
    )
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            same(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second or (first != first and second != second))


def short(value: Any) -> str:
    """Return the `repr` of a value on one line; of a long one, the beginning.

    Examples:
        >>> short({'type': 'weighted', 'by': [0.5] * 100})[:44]
        "{'type': 'weighted', 'by': [0.5, 0.5, 0.5, 0"
        >>> len(short([0.5] * 100)) <= 120
        True
    """
    return shorten(repr(value), 120, placeholder=' ...')
