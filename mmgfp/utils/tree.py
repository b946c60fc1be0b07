"""Nested arguments and outputs of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """All floating-point tensors in nested lists, tuples and dicts, and their like."""
    if isinstance(nest, Tensor):
        if nest.is_floating_point():
            yield nest
    elif isinstance(nest, dict):
        for value in nest.values():
            yield from tensors_in(value)
    elif isinstance(nest, list | tuple):
        for value in nest:
            yield from tensors_in(value)
    elif hasattr(nest, 'all_items'):  # mmengine's data elements
        for _, value in nest.all_items():
            yield from tensors_in(value)


def tree_map(function: Callable[[Any], Any], nest: Any) -> Any:
    """``function`` on everything in nested lists, plain tuples and dicts."""
    if type(nest) is dict:
        return {k: tree_map(function, v) for k, v in nest.items()}
    if type(nest) in (list, tuple):
        return type(nest)(tree_map(function, v) for v in nest)
    return function(nest)
