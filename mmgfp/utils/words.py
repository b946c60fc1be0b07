"""Words for people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    Examples:
        >>> counted(1, 'block'), counted(0, 'block')
        ('1 block', '0 blocks')
    """
    return f'{number} {noun}{"" if number == 1 else "s"}'
