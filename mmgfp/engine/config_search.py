"""Searches in nested configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict


def dicts_in(node: Any) -> Iterator[Any]:
    """Yield all dicts in a config, outer ones first."""
    if isinstance(node, dict | Config | ConfigDict):
        yield node
        for value in node.values():
            yield from dicts_in(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from dicts_in(value)


def values_in(node: Any, key: str, kind: type) -> Iterator[Any]:
    """Yield the values of ``key`` in all dicts of a config that are of type ``kind``.

    Examples:
        >>> model = dict(head=[dict(num_classes=3), dict(num_classes=None)])
        >>> list(values_in(model, 'num_classes', int))
        [3]
    """
    return (d[key] for d in dicts_in(node) if isinstance(d.get(key), kind))


def scope_of(cfg: Config) -> str | None:
    """Return the config's scope, or the installed library that its file lies in."""
    folders = Path(cfg.filename or '').parts
    library = next((n for n in ('mmdet', 'mmpretrain') if n in folders), None)
    return cfg.get('default_scope') or library


def testing_pipeline(cfg: Any) -> list[Mapping[str, Any]]:
    """Return the transforms of the images of testing, empty if the config has none."""
    for loader in ('test_dataloader', 'val_dataloader'):
        for node in dicts_in(cfg.get(loader) or {}):
            if node.get('pipeline'):
                return [step for step in node['pipeline'] if isinstance(step, Mapping)]
    return []
