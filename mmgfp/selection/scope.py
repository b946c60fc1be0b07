"""Scope: whether units of all groups compete, or each group has a share to lose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import nearest_hint
from mmgfp.utils.validation import check

SCOPES = ('global', 'local')
#: The entry of a file of ratios that holds them.
RATIOS_KEY = 'ratios'
REMEDY = "give such as {'backbone.*': 0.5} or the file that tools/sensitivity.py writes"


def read_ratios(scope: object, ratios: object) -> dict[str, float] | None:
    """Read the shares of groups that go at the end, and check them with the scope.

    Args:
        scope: ``'global'`` or ``'local'``.
        ratios: Shares in [0, 1] by the name of a group or a glob pattern, or a JSON
            file that has them under ``"ratios"``; None for the same share of all.

    Raises:
        ConfigError: If one of them is not valid, or shares are given for global scope.

    Examples:
        >>> read_ratios('local', {'backbone.*': 0.5})
        {'backbone.*': 0.5}
    """
    check('scope', scope in SCOPES, "'global' or 'local'", scope)
    if ratios is None:
        return None
    if scope != 'local':
        raise ConfigError(
            "ratios need scope='local', in which each group has a share of its own "
            f'(got scope={scope!r}); set it, or drop the ratios'
        )
    field = 'ratios'
    if isinstance(ratios, str | Path):
        field, ratios = f'ratios in {ratios}', _from_file(Path(ratios))
    if not isinstance(ratios, Mapping) or not ratios:
        expected = 'a dict of shares by names of groups, with some entries'
        raise ConfigError(field, expected, f'{ratios!r:.60}', REMEDY)
    for name, share in ratios.items():
        is_share = isinstance(share, int | float) and not isinstance(share, bool)
        if not isinstance(name, str) or not is_share or not 0 <= share <= 1:
            expected = 'shares in [0, 1] by names or patterns of groups'
            raise ConfigError(field, expected, f'{name!r}: {share!r}', REMEDY)
    return {name: float(share) for name, share in ratios.items()}


def _from_file(path: Path) -> Any:
    """Return what a JSON file holds under ``"ratios"``.

    Raises:
        ConfigError: If there is no such file or entry.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        got = f'{type(error).__name__}: {error}'
        expected = 'a JSON file that can be read'
        raise ConfigError(f'ratios in {path}', expected, got, REMEDY) from error
    if not isinstance(content, dict) or RATIOS_KEY not in content:
        expected, got = f'under the key {RATIOS_KEY!r}', f'{content!r:.60}'
        raise ConfigError(f'ratios in {path}', expected, got, REMEDY)
    return content[RATIOS_KEY]


def group_shares(
    scope: str, ratios: Mapping[str, float] | None, names: Sequence[str]
) -> np.ndarray | None:
    """Return the share of each group in proportion to which it shrinks, (G,).

    A group's own name goes before patterns, and among these the first one that fits.

    Args:
        scope: ``'global'`` or ``'local'``.
        ratios: What `read_ratios` gives.
        names: Names of the groups.

    Returns:
        np.ndarray: The shares; 0 for groups that are not named, 1 for all without
        ratios; None under global scope.

    Raises:
        ConfigError: If an entry fits no group.

    Examples:
        >>> ratios = {'head.*': 0.25, 'head.a': 0.5}
        >>> group_shares('local', ratios, ['stem', 'head.a', 'head.b']).tolist()
        [0.0, 0.5, 0.25]
    """
    if scope == 'global':
        return None
    if ratios is None:
        return np.ones(len(names))
    for key in ratios:
        if not any(name == key or fnmatchcase(name, key) for name in names):
            raise ConfigError(
                'ratios',
                'of groups that the model has',
                repr(key),
                nearest_hint(key, names) or f'groups are {", ".join(names)[:200]}',
            )
    return np.array([_share(ratios, name) for name in names])


def _share(ratios: Mapping[str, float], name: str) -> float:
    fitting = (share for key, share in ratios.items() if fnmatchcase(name, key))
    return ratios[name] if name in ratios else next(fitting, 0.0)
