"""What a pruned model looks like: the entries kept in every tensor dimension."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmgfp.groups import ChannelGroup, gone_entries, is_layer
from mmgfp.tracing import width_attributes
from mmgfp.utils.errors import StructureError
from mmgfp.utils.io import atomic_write, load_weights_only

#: The key under which a checkpoint holds its structure.
STRUCTURE_KEY = 'prune_structure'
VERSION = 1


@dataclass(frozen=True)
class PruneStructure:
    """Which entries of each tensor dimension a compact model keeps.

    Attributes:
        sizes: Original shape by tensor name, for each tensor that shrinks.
        kept: Kept indices, ascending, by tensor name and dimension.
        attributes: Numbers of channels that modules repeat in an attribute, by its
            name, such as ``roi_head.bbox_roi_extractor.out_channels``.
    """

    sizes: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        groups: Sequence[ChannelGroup],
        kept: np.ndarray,
        shapes: Mapping[str, Sequence[int]],
    ) -> PruneStructure:
        """The structure that is left when only the units ``kept``, (U,), stay.

        Args:
            groups: The groups of the units.
            kept: Units that stay, (U,).
            shapes: What `shapes_of` says of the model.
        """
        attributes = {
            m.name for g in groups for m in g.members if m.role == 'attribute'
        }
        structure = cls()
        for (name, dim), gone in sorted(gone_entries(groups, kept).items()):
            left = np.delete(np.arange(shapes[name][dim]), gone)
            if name in attributes:
                structure.attributes[name] = len(left)
                continue
            structure.sizes[name] = list(shapes[name])
            structure.kept.setdefault(name, {})[dim] = left.tolist()
        return structure

    def shape(self, name: str) -> list[int]:
        """Shape of the tensor called ``name`` in the compact model."""
        shape = list(self.sizes[name])
        for dim, kept in self.kept[name].items():
            shape[dim] = len(kept)
        return shape

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON and weights-only checkpoints hold them."""
        tensors = {
            name: {
                'shape': self.sizes[name],
                'kept': {str(dim): kept for dim, kept in dims.items()},
            }
            for name, dims in self.kept.items()
        }
        return {
            'version': VERSION,
            'tensors': tensors,
            'attributes': dict(self.attributes),
        }

    @classmethod
    def from_dict(cls, raw: Any, source: str = 'structure') -> PruneStructure:
        """Read and validate what `to_dict` wrote.

        Raises:
            StructureError: Another version, indices that are not ascending and
                within the tensor's size, or attributes that are no positive numbers.
        """
        remedy = 'use the file that a mmgfp pruning run or tools/deploy_pruned.py wrote'
        version = raw.get('version') if isinstance(raw, Mapping) else None
        if version != VERSION:
            raise StructureError(
                source, f'a structure of version {VERSION}', repr(version), remedy
            )
        structure = cls()
        try:
            for name, entry in raw['tensors'].items():
                structure.sizes[name] = _whole_numbers(entry['shape'])
                structure.kept[name] = {
                    int(dim): _whole_numbers(kept)
                    for dim, kept in entry['kept'].items()
                }
            for name, width in raw.get('attributes', {}).items():
                structure.attributes[str(name)] = width
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise StructureError(
                source, 'tensors with shape and kept', repr(e), remedy
            ) from None
        structure._validate(source, remedy)
        return structure

    def _validate(self, source: str, remedy: str) -> None:
        for name, width in self.attributes.items():
            if type(width) is not int or width < 1:
                raise StructureError(
                    f'{source}: {name}', 'a number of channels', repr(width), remedy
                )
        for name, dims in self.kept.items():
            shape = self.sizes[name]
            for dim, kept in dims.items():
                size = shape[dim] if 0 <= dim < len(shape) else 0
                ascending = all(a < b for a, b in zip(kept, kept[1:], strict=False))
                if not kept or not ascending or kept[0] < 0 or kept[-1] >= size:
                    raise StructureError(
                        f'{source}: {name} dimension {dim}',
                        f'ascending indices below {size}',
                        f'{len(kept)} indices, {kept[:3]}...',
                        remedy,
                    )

    @classmethod
    def load(cls, path: str | Path) -> PruneStructure:
        """Read a structure from a ``.json`` file or from inside a checkpoint.

        Raises:
            StructureError: The file is missing, damaged or holds no structure.
        """
        path = Path(path)
        if path.suffix == '.json':
            try:
                raw = json.loads(path.read_text())
            except (OSError, ValueError, RecursionError) as error:
                raise StructureError(
                    str(path), 'a readable JSON file', str(error), 'check the path'
                ) from None
        else:
            checkpoint = load_weights_only(path)
            raw = checkpoint.get(STRUCTURE_KEY)
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

    def check_fits(self, model: nn.Module, source: str = 'structure') -> None:
        """Check that ``model`` is what this structure was made from.

        Raises:
            StructureError: A tensor is missing or of another shape, an attribute is
                missing or smaller already, or tensors of one module disagree.
        """
        for name, width in self.attributes.items():
            value = _attribute(model, name)
            if value is None or value < width:
                raise StructureError(
                    f'{source}: {name}',
                    f'a number of at least {width}',
                    repr(value),
                    'use it with the architecture that was pruned',
                )
        tensors: dict[str, torch.Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, shape in self.sizes.items():
            got = list(tensors[name].shape) if name in tensors else 'no such tensor'
            if got != shape:
                raise StructureError(
                    f'{source}: {name}',
                    f'shape {shape}',
                    str(got),
                    'use it with the architecture that was pruned',
                )
        # By identity, as a tensor may have several names.
        kept = {id(tensors[name]): dims for name, dims in self.kept.items()}
        for name, module in model.named_modules():
            _check_module(f'{source}: {name}', module, kept)


def _check_module(
    name: str, module: nn.Module, kept: Mapping[int, dict[int, list[int]]]
) -> None:
    """The tensors of a layer or norm must keep the same channels.

    Args:
        name: What to call it in the message.
        module: Any module, not cut yet.
        kept: Kept indices by dimension, by the identity of the tensor.

    Raises:
        StructureError: They do not.
    """
    weight = getattr(module, 'weight', None)
    layer, groups = is_layer(module), getattr(module, 'groups', 1)
    if not isinstance(weight, torch.Tensor) or not (layer or weight.dim() == 1):
        return
    transposed = getattr(module, 'transposed', False)
    if transposed and groups > 1:
        return  # its outputs are numbered anew in each group
    remedy = 'use the file that a mmgfp pruning run wrote'
    made = kept.get(id(weight), {}).get(int(transposed))
    for key in ('bias', 'running_mean', 'running_var'):
        tensor = getattr(module, key, None)
        own = kept.get(id(tensor), {}).get(0)
        if isinstance(tensor, torch.Tensor) and own != made:
            raise StructureError(
                f'{name}.{key}',
                "the channels that the module's weight keeps",
                f'{len(own)} others' if own else 'all',
                remedy,
            )
    if layer and made and groups > 1:
        parts = np.array(made) // (len(weight) // groups)
        counts = np.unique(parts, return_counts=True)[1].tolist()
        if len(set(counts)) > 1:
            expected = 'as many outputs in each group of the convolution'
            raise StructureError(f'{name}.weight', expected, str(counts), remedy)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name, and of all attributes that count channels."""
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    for name, module in model.named_modules():
        for attribute, width in width_attributes(module).items():
            shapes[f'{name}.{attribute}'] = (width,)
    return shapes


def _attribute(model: nn.Module, name: str) -> int | None:
    """An attribute that counts channels, or None if there is no such one."""
    module, _, attribute = name.rpartition('.')
    owner = dict(model.named_modules()).get(module)
    return None if owner is None else width_attributes(owner).get(attribute)


def _whole_numbers(raw: Any) -> list[int]:
    """``raw`` if it is a list of whole numbers.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(raw, list) or any(type(i) is not int for i in raw):
        raise TypeError(f'{str(raw)[:50]} is no list of whole numbers')
    return raw
