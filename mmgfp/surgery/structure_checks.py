"""Checks of what a file gives as a structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmgfp.utils.errors import StructureError

if TYPE_CHECKING:
    from mmgfp.surgery.structure import PruneStructure

REMEDY = 'use the file that a mmgfp pruning run or tools/deploy_pruned.py wrote'


def validate(structure: PruneStructure, source: str) -> None:
    """Check the parts of a structure against each other.

    Args:
        structure: The structure.
        source: Where it comes from, for messages.

    Raises:
        StructureError: If something does not fit.
    """
    for name in (*structure.identities, *structure.kept, *structure.attributes):
        if structure.is_gone(name):
            raise StructureError(
                f'{source}: {name}',
                f'outside of the modules that are replaced, {structure.identities}',
                'inside of one',
                REMEDY,
            )
    for name, width in structure.attributes.items():
        if type(width) is not int or width < 1:
            raise StructureError(
                f'{source}: {name}', 'a number of channels', repr(width), REMEDY
            )
    for name, dims in structure.kept.items():
        shape = structure.sizes[name]
        for dim, kept in dims.items():
            size = shape[dim] if 0 <= dim < len(shape) else 0
            ascending = all(a < b for a, b in zip(kept, kept[1:], strict=False))
            if not kept or not ascending or kept[0] < 0 or kept[-1] >= size:
                raise StructureError(
                    f'{source}: {name} dimension {dim}',
                    f'ascending indices below {size}',
                    f'{len(kept)} indices, {kept[:3]}...',
                    REMEDY,
                )


def names_of(raw: Any) -> tuple[str, ...]:
    """Return ``raw`` if it is a list of names of modules, each once.

    Raises:
        TypeError: If it is anything else.
    """
    is_list = isinstance(raw, list) and all(isinstance(n, str) and n for n in raw)
    if not is_list or len(set(raw)) < len(raw):
        raise TypeError(f'{str(raw)[:50]} is no list of different names')
    return tuple(raw)


def whole_numbers(raw: Any) -> list[int]:
    """Return ``raw`` if it is a list of whole numbers.

    Raises:
        TypeError: If it is anything else.
    """
    # Not isinstance: True and False are instances of int.
    if not isinstance(raw, list) or any(type(i) is not int for i in raw):
        raise TypeError(f'{str(raw)[:50]} is no list of whole numbers')
    return raw
