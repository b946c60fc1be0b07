"""Configs as text that people read: entries on top of another config, with comments."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

#: Columns of a line.
WIDTH = 88
#: Expressions that may stand for a value: a variable of the file, or of its base.
EXPRESSION = re.compile(r"""(['"])\{\{\s*([\w.]+)\s*\}\}\1""")


@dataclass(frozen=True)
class Entry:
    """One entry of a config file.

    Attributes:
        name: Its name.
        value: Its value in plain types; the text ``'{{name}}'`` is a variable.
        comment: What is said above it.
    """

    name: str
    value: Any
    comment: str = ''


def config_text(title: str, base: str, entries: Sequence[Entry]) -> str:
    """Return a config file that inherits from ``base``.

    Args:
        title: What the config is for; the first comment.
        base: What `_base_` names.
        entries: The other entries, in order.

    Examples:
        >>> entry = Entry('model', dict(structure='{{pruned}}'), 'Cut.')
        >>> print(config_text('Trains.', './net.py', [entry]), end='')
        # Trains.
        _base_ = './net.py'
        # Cut.
        model = dict(structure=pruned)
    """
    parts = [_comment(title), f'_base_ = {base!r}\n']
    for entry in entries:
        parts += [_comment(entry.comment)] if entry.comment else []
        start = f'{entry.name} = '
        parts.append(f'{start}{literal(entry.value, len(start))}\n')
    return EXPRESSION.sub(_expression, ''.join(parts))


def _comment(text: str) -> str:
    lines = textwrap.wrap(
        text, WIDTH - 2, break_long_words=False, break_on_hyphens=False
    )
    return ''.join(f'# {line}\n' for line in lines)


def _expression(match: re.Match[str]) -> str:
    """Return a variable: of the base in the braces that MMEngine reads."""
    name = match.group(2)
    return f'{{{{{name}}}}}' if name.startswith('_base_.') else name


def literal(value: Any, used: int = 0, indent: int = 0, width: int = WIDTH) -> str:
    """Return an expression for a value of plain types, dicts by keywords.

    It is spread over several lines if it is too long for one.

    Args:
        value: The value.
        used: Characters before it in its line, beside the indent.
        indent: Spaces that its line begins with.
        width: Columns of a line.

    Examples:
        >>> literal(dict(type='Resize', scale=(32, 32), keep_ratio=True))
        "dict(type='Resize', scale=(32, 32), keep_ratio=True)"
        >>> print(literal(dict(type='Resize', scale=(32, 32)), width=20))
        dict(
            type='Resize',
            scale=(32, 32),
        )
        >>> literal({'2 words': [None]})
        "{'2 words': [None]}"
    """
    start, end, items = _parts(value)
    if items is None:
        return start
    flat = f'{start}{", ".join(n + literal(v, width=10**6) for n, v in items)}{end}'
    if isinstance(value, tuple) and len(value) == 1:
        flat = f'{flat[:-1]},)'
    if indent + used + len(flat) < width or not items:  # with a comma behind it
        return flat
    inner = (f'{n}{literal(v, len(n), indent + 4, width)},' for n, v in items)
    lines = ''.join(f'{" " * (indent + 4)}{line}\n' for line in inner)
    return f'{start}\n{lines}{" " * indent}{end}'


def _parts(value: Any) -> tuple[str, str, list[tuple[str, Any]] | None]:
    """Return brackets and the items, each with its beginning; None without brackets."""
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and _is_name(k) for k in value):
            return 'dict(', ')', [(f'{k}=', v) for k, v in value.items()]
        return '{', '}', [(f'{k!r}: ', v) for k, v in value.items()]
    if isinstance(value, list | tuple):
        brackets = '()' if isinstance(value, tuple) else '[]'
        return *brackets, [('', v) for v in value]
    return repr(value), '', None


def _is_name(key: str) -> bool:
    return key.isidentifier() and not iskeyword(key)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return what turns the dict ``old`` into ``new`` when a config inherits from it.

    Examples:
        >>> changes(dict(a=dict(b=1, c=2), d=3), dict(a=dict(b=1, c=4), d=3, e=[5]))
        {'a': {'c': 4}, 'e': [5]}
        >>> changes(dict(a=dict(b=1)), dict(a=dict(c=2)))
        {'a': {'_delete_': True, 'c': 2}}
    """
    result: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            if before.keys() - value.keys():
                result[key] = {'_delete_': True, **value}
            elif inner := changes(before, value):
                result[key] = inner
        elif key not in old or before != value:
            result[key] = copy.deepcopy(value)
    return result


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts in one, in which entries of ``second`` win.

    Examples:
        >>> merged(dict(a=dict(b=1), c=2), dict(a=dict(d=3), c=4))
        {'a': {'b': 1, 'd': 3}, 'c': 4}
    """
    result = dict(first)
    for key, value in second.items():
        before = result.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[key] = merged(before, value) if both else value  # type: ignore[arg-type]
    return result
