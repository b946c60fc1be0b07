"""Checks that a structure fits a model, and that weights fit a structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmgfp.surgery.structure import PruneStructure
from mmgfp.tracing import width_attributes
from mmgfp.utils.errors import MMGFPError, StructureError
from mmgfp.utils.layers import is_layer, output_dim

#: Kept indices by dimension, by the identity of a tensor, which may have several names.
Kept = Mapping[int, Mapping[int, Sequence[int]]]


def check_fits(
    structure: PruneStructure, model: nn.Module, source: str = 'structure'
) -> None:
    """Check that ``model`` is an unpruned one that ``structure`` was made from.

    Args:
        structure: The structure.
        model: The model.
        source: Where the structure comes from, for messages.

    Raises:
        StructureError: If a tensor is missing or has another shape, if an attribute is
            missing or smaller already, if a module to replace is missing, or if tensors
            of one module disagree.
    """
    remedy = 'use it with the architecture that was pruned'
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in structure.identities:
        if name not in modules:
            raise StructureError(
                f'{source}: {name}', 'a module to replace', 'no such module', remedy
            )
    for name, width in structure.attributes.items():
        value = _attribute(model, name)
        if value is None or value < width:
            raise StructureError(
                f'{source}: {name}',
                f'a number of at least {width}',
                repr(value),
                remedy,
            )
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, shape in structure.sizes.items():
        got = list(tensors[name].shape) if name in tensors else 'no such tensor'
        if got != shape:
            raise StructureError(
                f'{source}: {name}', f'of shape {shape}', str(got), remedy
            )
    kept = {id(tensors[name]): dims for name, dims in structure.kept.items()}
    for name, module in model.named_modules():
        _check_module(f'{source}: {name}', module, kept)


def check_shapes(
    weights: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    reference: str,
    remedy: str,
    error: type[MMGFPError] = StructureError,
) -> None:
    """Refuse weights of other shapes, which loading would skip with a warning.

    Args:
        weights: The weights to load; those that are missing are no matter here.
        shapes: Shapes that they must have.
        reference: Where these shapes come from, for the message.
        remedy: Which weights to give instead.
        error: The error to raise, where the weights are not what is wrong.

    Raises:
        StructureError: If a tensor has another shape.

    Examples:
        >>> import torch
        >>> check_shapes({'bias': torch.ones(4)}, {'bias': (4,)}, 'of the model', '')
    """
    for name, shape in shapes.items():
        got = getattr(weights.get(name), 'shape', None)
        if got is not None and list(got) != list(shape):
            raise error(
                f'checkpoint: {name}',
                f'of shape {list(shape)} {reference}',
                str(list(got)),
                remedy,
            )


def _check_module(name: str, module: nn.Module, kept: Kept) -> None:
    """Check that the tensors of a layer or norm keep the same channels.

    Args:
        name: Name of the module, for messages.
        module: Any module of the unpruned model.
        kept: Kept indices of all tensors.

    Raises:
        StructureError: If they keep different ones.
    """
    weight = getattr(module, 'weight', None)
    groups = getattr(module, 'groups', 1)
    if not isinstance(weight, Tensor) or not (is_layer(module) or weight.dim() == 1):
        return
    if output_dim(module) == 1 and groups > 1:
        return  # dimension 1 of the weight numbers the outputs of each group anew
    outputs = kept.get(id(weight), {}).get(output_dim(module))
    remedy = 'use the file that a mmgfp pruning run wrote'
    for key in ('bias', 'running_mean', 'running_var'):
        tensor = getattr(module, key, None)
        entries = kept.get(id(tensor), {}).get(0)
        if isinstance(tensor, Tensor) and entries != outputs:
            got = f'{len(entries)} others' if entries else 'all'
            raise StructureError(
                f"{name}.{key} must keep the channels that the module's weight keeps "
                f'(got {got}); {remedy}'
            )
    if is_layer(module) and outputs and groups > 1:
        group_of = np.array(outputs) // (len(weight) // groups)
        counts = np.unique(group_of, return_counts=True)[1].tolist()
        if len(set(counts)) > 1:
            raise StructureError(
                f'{name}.weight must keep as many outputs in each group of the '
                f'convolution as in the others (got {counts}); {remedy}'
            )


def _attribute(model: nn.Module, name: str) -> int | None:
    """Return the value of an attribute that counts channels, None if it does not."""
    module, _, attribute = name.rpartition('.')
    owner = dict(model.named_modules()).get(module)
    return None if owner is None else width_attributes(owner).get(attribute)
