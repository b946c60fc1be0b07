"""Tells whoever listens what long work is at, without knowing who that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Listener(Protocol):
    """Shows what is under way."""

    def begin(self, line: str, total: int | None = None) -> None:
        """Show a step, and count its parts from zero."""

    def advance(self) -> None:
        """Count a part."""


_LISTENERS: list[Listener] = []


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Tell a listener of all steps within the block, as the innermost one."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def begin_step(line: str, total: int | None = None) -> None:
    """Say that a step begins.

    Args:
        line: What is under way.
        total: Its parts, if they are known.

    Examples:
        >>> from types import SimpleNamespace
        >>> shown = SimpleNamespace(begin=lambda line, total: print(line, total))
        >>> with told_to(shown):
        ...     begin_step('measuring cuts', 25)
        measuring cuts 25
        >>> begin_step('nobody listens')
    """
    if _LISTENERS:
        _LISTENERS[-1].begin(line, total)


def advance_step() -> None:
    """Say that a part of the step is done."""
    if _LISTENERS:
        _LISTENERS[-1].advance()
