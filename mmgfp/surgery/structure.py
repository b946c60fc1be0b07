"""The structure of a pruned model: the entries kept in every tensor dimension."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mmgfp.groups import ChannelGroup, removed_entries
from mmgfp.surgery.structure_checks import REMEDY, names_of, validate, whole_numbers
from mmgfp.tracing import width_attributes
from mmgfp.utils.errors import StructureError
from mmgfp.utils.io import atomic_write, load_weights_only

#: The key under which a checkpoint holds its structure.
STRUCTURE_KEY = 'prune_structure'
VERSION = 1


@dataclass(frozen=True)
class PruneStructure:
    """The entries of each tensor dimension that a compact model keeps.

    Modules that are gone whole have none: `nn.Identity` takes their places.

    Attributes:
        sizes: Original shape by tensor name, for each tensor that shrinks.
        kept: Kept indices, ascending, by tensor name and dimension.
        attributes: Numbers of channels that modules repeat in an attribute, by its
            name, such as ``roi_head.bbox_roi_extractor.out_channels``.
        identities: Names of the modules that `nn.Identity` replaces, in order.

    Examples:
        >>> structure = PruneStructure(
        ...     sizes={'conv.weight': [8, 3, 3, 3], 'conv.bias': [8]},
        ...     kept={'conv.weight': {0: [1, 2, 5]}, 'conv.bias': {0: [1, 2, 5]}},
        ... )
        >>> structure.shape('conv.weight')
        [3, 3, 3, 3]
        >>> PruneStructure.from_dict(structure.to_dict()) == structure
        True
    """

    sizes: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    identities: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = f'{len(self.sizes)} tensors, {len(self.attributes)} attributes'
        gone = f', without {", ".join(self.identities)}' if self.identities else ''
        return f'PruneStructure({parts}{gone})'

    @classmethod
    def of(
        cls,
        groups: Sequence[ChannelGroup],
        kept: np.ndarray,
        shapes: Mapping[str, Sequence[int]],
        identities: Sequence[str] = (),
    ) -> PruneStructure:
        """Return the structure of a model that keeps only some of its units.

        Args:
            groups: The groups of the model.
            kept: Which units it keeps, (U,).
            shapes: What `shapes_of` gives for the model.
            identities: Modules that it loses whole.
        """
        attributes = {
            m.name for g in groups for m in g.members if m.role == 'attribute'
        }
        structure = cls(identities=tuple(sorted(identities)))
        for (name, dim), removed in sorted(removed_entries(groups, kept).items()):
            if structure.is_gone(name):
                continue
            remaining = np.delete(np.arange(shapes[name][dim]), removed)
            if name in attributes:
                structure.attributes[name] = len(remaining)
                continue
            structure.sizes[name] = list(shapes[name])
            structure.kept.setdefault(name, {})[dim] = remaining.tolist()
        return structure

    def is_gone(self, name: str) -> bool:
        """Return whether a tensor or a module is in a module that is replaced."""
        parts = name.split('.')
        return any('.'.join(parts[:i]) in self.identities for i in range(1, len(parts)))

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor in the compact model."""
        shape = list(self.sizes[name])
        for dim, kept in self.kept[name].items():
            shape[dim] = len(kept)
        return shape

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, as JSON and weights-only checkpoints hold them."""
        tensors = {
            name: {
                'shape': self.sizes[name],
                'kept': {str(dim): kept for dim, kept in dims.items()},
            }
            for name, dims in self.kept.items()
        }
        raw = {
            'version': VERSION,
            'tensors': tensors,
            'attributes': dict(self.attributes),
        }
        # Left out where there are none, so that older files stay as they are.
        return raw | ({'identities': [*self.identities]} if self.identities else {})

    @classmethod
    def from_dict(cls, raw: Any, source: str = 'structure') -> PruneStructure:
        """Read and validate the result of `to_dict`.

        Args:
            raw: Anything, as files may be damaged or crafted.
            source: Where it comes from, for messages.

        Raises:
            StructureError: If it is of another version, if indices do not ascend or
                exceed the tensor's size, if an attribute is no positive number, or if
                something is inside of a module that is replaced.
        """
        version = raw.get('version') if isinstance(raw, Mapping) else None
        if version != VERSION:
            raise StructureError(
                source, f'a structure of version {VERSION}', repr(version), REMEDY
            )
        try:
            structure = cls(identities=names_of(raw.get('identities', [])))
            for name, entry in raw['tensors'].items():
                structure.sizes[name] = whole_numbers(entry['shape'])
                structure.kept[name] = {
                    int(dim): whole_numbers(kept) for dim, kept in entry['kept'].items()
                }
            for name, width in raw.get('attributes', {}).items():
                structure.attributes[str(name)] = width
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise StructureError(
                source, 'a dict of tensors with shape and kept', repr(e), REMEDY
            ) from None
        validate(structure, source)
        return structure

    @classmethod
    def load(cls, path: str | Path) -> PruneStructure:
        """Read a structure from a ``.json`` file or from inside a checkpoint.

        Raises:
            StructureError: If the file is missing, damaged or holds no structure.
        """
        path = Path(path)
        if not path.is_file():
            raise StructureError(
                f'the structure {path}',
                'a .json file or a checkpoint that holds its structure',
                'nothing there',
                'check the path, or name one with --cfg-options model.structure=FILE',
            )
        if path.suffix == '.json':
            try:
                raw = json.loads(path.read_text())
            except (OSError, ValueError, RecursionError) as error:
                raise StructureError(
                    str(path), 'a readable JSON file', str(error), 'check the path'
                ) from None
        else:
            raw = load_weights_only(path).get(STRUCTURE_KEY)
        if raw is None:
            raise StructureError(
                str(path),
                f'a checkpoint with the key {STRUCTURE_KEY!r}',
                'one without',
                'give a checkpoint that a pruning run saved at its target',
            )
        return cls.from_dict(raw, str(path))

    def save(self, path: str | Path) -> None:
        """Write a readable ``.json`` file, whole or not at all."""
        text = json.dumps(self.to_dict())
        atomic_write(path, lambda tmp: tmp.write_text(text))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return shapes by name, of all tensors and of attributes that count channels."""
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    # Some buffers are in no state, but shrink as the others do.
    shapes |= {n: tuple(b.shape) for n, b in model.named_buffers()}
    for name, module in model.named_modules():
        for attribute, width in width_attributes(module).items():
            shapes[f'{name}.{attribute}'] = (width,)
    return shapes
