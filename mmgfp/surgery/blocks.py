"""Modules that go whole: residual blocks while they are masked, and their removal."""

from __future__ import annotations

import numpy as np
from torch import nn

from mmgfp.groups import ChannelGroup, Member, ResidualBlock


def block_mask(model: nn.Module, block: ResidualBlock) -> ChannelGroup:
    """Return what is held at zero once a residual block is pruned, as a group.

    Its one unit takes all entries of the weight and the bias of the block's last norm
    or layer: the branch then puts out zero.

    Examples:
        >>> group = block_mask(nn.Sequential(nn.Linear(2, 3)), ResidualBlock('', '0'))
        >>> [(m.name, m.index.tolist()) for m in group.members]
        [('0.weight', [[0, 1, 2]]), ('0.bias', [[0, 1, 2]])]
    """
    tensors = model.get_submodule(block.last).named_parameters(recurse=False)
    members = (
        # A mask holds what has the role of an input.
        Member(f'{block.last}.{name}', 0, np.arange(len(tensor))[None], 'in')
        for name, tensor in tensors
    )
    return ChannelGroup(block.name, tuple(members))


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever the model has that.

    Args:
        model: The model, in place.
        name: One of the names of the module that goes.
        new: The module that takes its place, in the same mode.
    """
    old = model.get_submodule(name)
    new.training = old.training
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
