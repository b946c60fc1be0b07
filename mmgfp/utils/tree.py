"""Nested arguments and outputs of modules: lists, tuples and dicts as trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tree_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a tree.

    Its nodes are lists, tuples, dicts, classes derived from them, and MMEngine's data
    elements; other leaves are passed over.

    Examples:
        >>> import torch
        >>> outputs = {'boxes': [torch.ones(2, 4), torch.ones(3, 4)], 'id': 7}
        >>> [tuple(tensor.shape) for tensor in tree_tensors(outputs)]
        [(2, 4), (3, 4)]
    """
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tree_tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tree_tensors(value)
    elif hasattr(tree, 'all_items'):  # MMEngine's data elements, without importing it
        for _, value in tree.all_items():
            yield from tree_tensors(value)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with ``function`` applied to each leaf.

    Its nodes are plain lists, tuples and dicts. A named tuple, say, is a leaf, since
    not every class derived from these can be built from its items.

    Examples:
        >>> tree_map(lambda x: 2 * x, {'a': [1, 2], 'b': (3,)})
        {'a': [2, 4], 'b': (6,)}
    """
    if type(tree) is dict:
        return {k: tree_map(function, v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(tree_map(function, v) for v in tree)
    return function(tree)
