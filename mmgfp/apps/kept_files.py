"""Configs that a tool writes once, and that belong to their user from then on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.apps.cli import write_json
from mmgfp.apps.rounds_file import digest_of
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import atomic_write
from mmgfp.utils.plain import short


class KeptFiles:
    """Writes config files, and leaves alone what a user has made of them.

    Args:
        notes: A JSON file with digests of what was written, to tell edited files.
    """

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def write(self, path: Path, text: str, used: bool, remedy: str) -> str:
        """Write a file unless its user has edited it.

        Args:
            path: The file.
            text: What it shall hold.
            used: Whether work has begun that went by what it holds.
            remedy: What helps if it has.

        Returns:
            What was done, in a line; nothing if it holds that already.

        Raises:
            ConfigError: If there is an unedited one of other settings that is in use.
        """
        digests = json.loads(self._notes.read_text()) if self._notes.is_file() else {}
        digest = digest_of(text.encode())
        before = path.read_text() if path.is_file() else None
        if before == text:
            said = ''
        elif before is not None and digest_of(before.encode()) != digests.get(
            path.name
        ):
            return f'{path}: kept as you edited it (delete it to have it written anew)'
        elif before is not None and used:
            other = difference(path, text)
            if not other:
                return ''  # in other words, as another version of mmgfp wrote it
            raise ConfigError(str(path), 'what this command writes', other, remedy)
        else:
            atomic_write(path, lambda tmp: tmp.write_text(text))
            said = f'{path}: written' + (' anew' if before is not None else '')
        if digests.get(path.name) != digest:
            write_json(self._notes, {**digests, path.name: digest})
        return said


def difference(path: Path, text: str) -> str:
    """Return where a config file differs from a text to replace it; empty if nowhere.

    Args:
        path: The file.
        text: The text, which holds where the file is.
    """
    other = path.with_name(f'.{path.stem}_anew.py')  # where relative paths hold
    try:
        other.write_text(text)
        configs = [Config.fromfile(file).to_dict() for file in (path, other)]
    finally:
        other.unlink(missing_ok=True)
    return first_difference(*configs)


def first_difference(old: Any, new: Any, name: str = '') -> str:
    """Return the first entry in which two configs differ; empty if there is none.

    Examples:
        >>> first_difference({'a': [{'b': 1}]}, {'a': [{'b': 2}]})
        'a.0.b=1 instead of 2'
    """
    if old == new:
        return ''
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = dict(enumerate(zip(old, new, strict=True)))
    else:
        return f'{name}={short(old)} instead of {short(new)}'
    below = (
        first_difference(*pair, f'{name}.{key}' if name else str(key))
        for key, pair in pairs.items()
    )
    return next(filter(None, below))
