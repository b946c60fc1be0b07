"""Words for people."""

from __future__ import annotations

from collections.abc import Sequence

#: Names that a line shows before it counts the rest.
MOST_NAMES = 4


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    Examples:
        >>> counted(1, 'block'), counted(0, 'block')
        ('1 block', '0 blocks')
    """
    return f'{number} {noun}{"" if number == 1 else "s"}'


def listed(names: Sequence[str]) -> str:
    """Return names in a line, no more than the first few.

    Examples:
        >>> listed(['a', 'b']), listed('abcdef')
        ('a, b', 'a, b, c, d and 2 more')
    """
    more = len(names) - MOST_NAMES
    rest = f' and {more} more' if more > 0 else ''
    return ', '.join(names[:MOST_NAMES]) + rest
