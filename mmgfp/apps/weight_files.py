"""The files of weights that the stages of a pipeline start from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgfp.apps.cli import load_config
from mmgfp.apps.rounds_file import digest_of_file

#: Suffixes by which weights are told from other files that a config names.
WEIGHTS = ('.pth', '.pt', '.ckpt', '.pkl', '.safetensors')


def digests_of(words: Sequence[str]) -> dict[str, str]:
    """Return a digest of each file of weights that a command and its configs name.

    Args:
        words: The words of the command: paths, or overrides as `key=value`, which
            count before what a config says.
    """
    digests: dict[str, str] = {}
    for word in words:
        if Path(word).suffix == '.py' and os.path.isfile(word):
            named = files_in(load_config(word).to_dict())
            digests |= {key: digest_of_file(path) for key, path in named}
    for word in words:
        key, _, value = word.partition('=')
        key, path = (word, word) if os.path.isfile(word) else (key, value)
        # Others are configs, which their users may edit, and what tools write.
        if os.path.isfile(path) and Path(path).suffix not in ('.py', '.json', '.html'):
            digests[key] = digest_of_file(path)
    return digests


def files_in(
    node: Any, key: str = '', suffixes: tuple[str, ...] = WEIGHTS
) -> Iterator[tuple[str, str]]:
    """Yield the files of some kind that a config names and that are there, by key.

    Examples:
        >>> [*files_in({'model': [{'init_cfg': 'nowhere.pth'}]})]
        []
    """
    entries: Any = ()
    if isinstance(node, Mapping):
        entries = node.items()
    elif isinstance(node, list | tuple):
        entries = enumerate(node)
    elif isinstance(node, str) and node.endswith(suffixes) and os.path.isfile(node):
        yield key, node
    for name, value in entries:
        yield from files_in(value, f'{key}.{name}' if key else str(name), suffixes)
