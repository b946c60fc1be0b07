"""Cutting a module down to a structure, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.surgery.structure import PruneStructure
from mmgfp.tracing import attention_spec, update_head_counts

CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True)
class Cut:
    """What became of a parameter or buffer.

    Attributes:
        old: The tensor as it was.
        new: The smaller one that has taken its place.
        kept: Kept indices, ascending, by dimension, (K,) each.
    """

    old: Tensor
    new: Tensor
    kept: Mapping[int, Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor that has an entry for each one of the old."""
        return _selected(tensor, self.kept)


def compact(model: nn.Module, structure: PruneStructure) -> nn.Module:
    """Shrink ``model`` in place to ``structure``; weights that stay are kept.

    Parameters and buffers are replaced by smaller ones, so an optimizer must be built
    afterwards. Tensors that several modules share stay shared.

    Returns:
        nn.Module: The same object.

    Raises:
        StructureError: The structure does not belong to the model.
    """
    cut(model, structure)
    return model


def cut(model: nn.Module, structure: PruneStructure) -> list[Cut]:
    """Shrink ``model`` in place, as `compact` does, and tell what took which place.

    Raises:
        StructureError: The structure does not belong to the model.
    """
    structure.check_fits(model)
    owners = _owners(model)
    touched: dict[int, nn.Module] = {}
    cuts: dict[int, Cut] = {}
    for name, kept in structure.kept.items():
        module_name, _, attribute = name.rpartition('.')
        tensor = getattr(model.get_submodule(module_name), attribute)
        if id(tensor) in cuts:
            continue
        made = _made(tensor, kept)
        cuts[id(made.new)] = made
        for module, key in owners[id(tensor)]:
            _count_groups(module, key, kept)
            setattr(module, key, made.new)
            touched[id(module)] = module
    for module in reversed(list(model.modules())):  # blocks after their layers
        if id(module) in touched or _wraps(module, touched):
            touched[id(module)] = module
            fix_attributes(module)
    for name, width in structure.attributes.items():
        module_name, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(module_name), attribute, width)
    return [*cuts.values()]


def _made(old: Tensor, kept: Mapping[int, Sequence[int]]) -> Cut:
    indices = {
        dim: torch.from_numpy(np.array(index)).to(old.device)  # lists take longer
        for dim, index in kept.items()
    }
    new = _selected(old.detach(), indices)
    if not old.is_contiguous() and old.is_contiguous(memory_format=CHANNELS_LAST):
        new = new.contiguous(memory_format=CHANNELS_LAST)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    return Cut(old, new, indices)


def _selected(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index)
    return tensor


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, key))
    return owners


def _count_groups(module: Any, key: str, kept: dict[int, list[int]]) -> None:
    """Let a group convolution know how many of its conv groups keep outputs."""
    if key == 'weight' and 0 in kept and _convolves(module) and module.groups > 1:
        width = len(module.weight) // module.groups
        module.groups = len({i // width for i in kept[0]})


def _wraps(module: nn.Module, touched: dict[int, nn.Module]) -> bool:
    """A block around a layer that was cut, which may repeat attributes of it."""
    parts = list(module.children())
    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            parts += part.modules()
    return any(id(part) in touched for part in parts)


Fixer = Callable[[Any], None]
#: Attribute rules: (applies to the module, makes its attributes true), in order.
ATTRIBUTE_RULES: list[tuple[Callable[[nn.Module], bool], Fixer]] = []


def register_attributes(
    applies: Callable[[nn.Module], bool],
) -> Callable[[Fixer], Fixer]:
    """Register how a kind of module reads its attributes off its tensors."""

    def register(fixer: Fixer) -> Fixer:
        ATTRIBUTE_RULES.append((applies, fixer))
        return fixer

    return register


def has_attribute_rule(module: nn.Module) -> bool:
    """Whether the module's attributes follow from its own tensors."""
    return any(applies(module) for applies, _ in ATTRIBUTE_RULES)


def fix_attributes(module: nn.Module) -> None:
    """Make ``in_channels``, ``groups``, ``num_features`` and their like true."""
    for applies, fixer in ATTRIBUTE_RULES:
        if applies(module):
            fixer(module)
            return


def _convolves(module: nn.Module) -> bool:
    """Convolutions of torch and mmcv, deformable ones among them."""
    names = ('in_channels', 'out_channels', 'groups')
    return all(hasattr(module, n) for n in names) and isinstance(
        getattr(module, 'weight', None), Tensor
    )


@register_attributes(_convolves)
def _fix_conv(conv: Any) -> None:
    weight = conv.weight
    if getattr(conv, 'transposed', False):
        conv.in_channels = weight.shape[0]
        conv.out_channels = weight.shape[1] * conv.groups
        return
    conv.in_channels = weight.shape[1] * conv.groups
    conv.out_channels = weight.shape[0]


@register_attributes(lambda m: isinstance(m, nn.Linear))
def _fix_linear(linear: Any) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


@register_attributes(
    lambda m: hasattr(m, 'num_features') and hasattr(m, 'running_mean')
)
def _fix_batch_norm(norm: Any) -> None:
    tensors = (norm.weight, norm.bias, norm.running_mean)
    norm.num_features = next(len(t) for t in tensors if t is not None)


@register_attributes(lambda m: isinstance(m, nn.GroupNorm))
def _fix_group_norm(norm: Any) -> None:
    width = norm.num_channels // norm.num_groups
    norm.num_channels = len(norm.weight)
    norm.num_groups = norm.num_channels // width


@register_attributes(lambda m: isinstance(m, nn.PReLU))
def _fix_prelu(prelu: Any) -> None:
    prelu.num_parameters = len(prelu.weight)


@register_attributes(
    lambda m: (
        hasattr(m, 'in_channels')
        and hasattr(m, 'out_channels')
        and isinstance(getattr(m, 'conv', None), nn.Module)
    )
)
def _fix_conv_block(block: Any) -> None:
    for name in ('in_channels', 'out_channels', 'groups'):
        if hasattr(block, name):
            setattr(block, name, getattr(block.conv, name))


@register_attributes(lambda m: hasattr(m, 'width') and hasattr(m, 'convs'))
def _fix_split_block(block: Any) -> None:
    """Res2Net splits its channels into parts of ``width``."""
    block.width = block.convs[0].in_channels


@register_attributes(
    lambda m: all(hasattr(m, n) for n in ('channels', 'expansion', 'global_avgpool'))
)
def _fix_dynamic_relu(relu: Any) -> None:
    """MMDetection's `DyReLU` splits what it computes into parts of ``channels``."""
    relu.channels = relu.conv2.out_channels // relu.expansion


@register_attributes(lambda m: attention_spec(m) is not None)
def _fix_attention(attention: Any) -> None:
    spec = attention_spec(attention)
    assert spec is not None
    update_head_counts(attention, spec)
    if hasattr(attention, 'ab'):  # what LeViT and its like keep ready for inference
        with torch.no_grad():
            index = attention.attention_bias_idxs
            attention.ab = attention.attention_biases[:, index]


@register_attributes(
    lambda m: hasattr(m, 'avg_parameters') and hasattr(m, 'update_buffers')
)
def _fix_averaged(averaged: Any) -> None:
    """MMEngine's averaged models keep hold of the tensors that they update."""
    module = averaged.module
    named = (
        module.state_dict() if averaged.update_buffers else module.named_parameters()
    )
    averaged.avg_parameters = dict(named)
