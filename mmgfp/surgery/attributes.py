"""Attributes of modules that must agree with their tensors, such as `in_channels`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mmgfp.tracing import attention_spec, update_head_counts
from mmgfp.utils.layers import CONV_ATTRIBUTES, has_conv_attributes, output_dim

Fixer = Callable[[Any], None]
#: Rules, of which the first that applies counts: (applies to the module, fixes it).
ATTRIBUTE_RULES: list[tuple[Callable[[nn.Module], bool], Fixer]] = []


def register_attributes(
    applies: Callable[[nn.Module], bool],
) -> Callable[[Fixer], Fixer]:
    """Register how a kind of module derives its attributes from its tensors.

    Args:
        applies: Whether a module is of this kind.

    Returns:
        Callable: A decorator of the function that sets the attributes of such a module.

    Examples:
        >>> import torch
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.width = width
        ...         self.factor = torch.nn.Parameter(torch.ones(width))
        >>> @register_attributes(lambda m: hasattr(m, 'factor') and hasattr(m, 'width'))
        ... def fix_scale(scale):
        ...     scale.width = len(scale.factor)
        >>> scale = Scale(4)
        >>> scale.factor = torch.nn.Parameter(torch.ones(3))
        >>> fix_attributes(scale)
        >>> scale.width
        3
    """

    def register(fixer: Fixer) -> Fixer:
        ATTRIBUTE_RULES.append((applies, fixer))
        return fixer

    return register


def has_attribute_rule(module: nn.Module) -> bool:
    """Return whether the module's attributes follow from its own tensors."""
    return any(applies(module) for applies, _ in ATTRIBUTE_RULES)


def fix_attributes(module: nn.Module) -> None:
    """Set ``in_channels``, ``groups``, ``num_features`` and their like to true values.

    Args:
        module: A module whose own tensors or children were replaced.
    """
    for applies, fixer in ATTRIBUTE_RULES:
        if applies(module):
            fixer(module)
            return


def fix_all_attributes(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Fix the attributes of modules and of the blocks around them.

    Args:
        model: The whole model.
        changed: Modules in it with new tensors.
    """
    touched = set(changed)
    # Children come before the blocks that repeat their attributes.
    for module in reversed(list(model.modules())):
        if module in touched or not touched.isdisjoint(_parts(module)):
            touched.add(module)
            fix_attributes(module)


def _parts(block: nn.Module) -> list[nn.Module]:
    """Return the children of a block and all that is inside of its containers."""
    parts = list(block.children())
    for child in block.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            parts += child.modules()
    return parts


def fix_conv_groups(module: nn.Module, kept: Sequence[int]) -> None:
    """Set ``groups`` of a convolution to the number of those that keep outputs.

    Args:
        module: Any module; all but convolutions with several groups are left alone.
        kept: Kept entries of dimension 0 of its weight, which is the old one still.
    """
    conv: Any = module
    if has_conv_attributes(module) and conv.groups > 1:
        width = len(conv.weight) // conv.groups
        conv.groups = len({i // width for i in kept})


@register_attributes(has_conv_attributes)
def _fix_conv(conv: Any) -> None:
    shape, out_dim = conv.weight.shape, output_dim(conv)
    # The weight of a group convolution holds dimension 1 for one of the groups only.
    channels = [shape[0], shape[1] * conv.groups]
    conv.out_channels, conv.in_channels = channels[out_dim], channels[1 - out_dim]


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
    """Mmcv's `ConvModule` repeats the numbers of its convolution."""
    for name in CONV_ATTRIBUTES:
        if hasattr(block, name):
            setattr(block, name, getattr(block.conv, name))


@register_attributes(
    lambda m: (
        hasattr(m, 'switch_to_deploy')
        and all(hasattr(m, name) for name in CONV_ATTRIBUTES)
        and _branch_conv(m) is not None
    )
)
def _fix_reparameterised_block(block: Any) -> None:
    """RepVGG, MobileOne and their like fuse branches into a convolution of these."""
    conv = _branch_conv(block)
    for name in CONV_ATTRIBUTES:
        setattr(block, name, getattr(conv, name))


def _branch_conv(block: nn.Module) -> Any:
    """Return the convolution of a branch, or the one that all were fused into."""
    for part in _parts(block):
        # Not any convolution inside: squeeze-and-excitation has other widths.
        conv = getattr(part, 'conv', None) if isinstance(part, nn.Sequential) else part
        if isinstance(conv, nn.Module) and has_conv_attributes(conv):
            return conv
    return None


@register_attributes(
    lambda m: all(hasattr(m, n) for n in ('switch_to_deploy', 'dim', 'token_mixer'))
)
def _fix_riformer_block(block: Any) -> None:
    """RIFormer fuses its first norm into one of ``dim`` channels."""
    norm = block.norm1
    block.dim = len(norm.weight)
    if isinstance(norm, nn.GroupNorm):
        # A new dict, because all blocks share the one of the backbone.
        block.norm_cfg = {**block.norm_cfg, 'num_groups': norm.num_groups}


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
    if hasattr(attention, 'ab'):  # LeViT and its like keep it ready for inference
        with torch.no_grad():
            index = attention.attention_bias_idxs
            attention.ab = attention.attention_biases[:, index]


@register_attributes(
    lambda m: hasattr(m, 'avg_parameters') and hasattr(m, 'update_buffers')
)
def _fix_averaged(averaged: Any) -> None:
    """MMEngine's averaged models hold on to the tensors that they update."""
    module = averaged.module
    named = (
        module.state_dict() if averaged.update_buffers else module.named_parameters()
    )
    averaged.avg_parameters = dict(named)
