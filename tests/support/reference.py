"""The paper's formulas written out slowly, to compare the package with."""

import numpy as np
import torch
from torch import Tensor, nn


def mask_fisher(
    model, loss, groups, images: int, image_of_rows=None, kept=None
) -> Tensor:
    """Fisher information of explicit masks on every layer's input, (units,).

    Each image has its own mask of ones, multiplied onto the input of every layer that
    reads or ties the unit's channels; autograd gives the masks' gradients.

    Args:
        model: The module.
        loss: Computes a scalar from the module.
        groups: Its channel groups.
        images: Number of images in the batch.
        image_of_rows: Says which image each row of a layer's input is from, (R,),
            given the layer's name and the input; by default the rows are the images.
        kept: Units whose masks are one, (U,); those of others are zero, but for layers
            that carry units on (with groups), which pruning leaves as they are.
    """
    count = sum(g.units for g in groups)
    dtype = next(model.parameters()).dtype
    masks = torch.ones(images, count, dtype=dtype)  # (N, U)
    if kept is not None:
        masks[:, ~torch.as_tensor(kept)] = 0
    masks.requires_grad_()
    handles = []
    for layer, units in input_units(model, groups).items():
        module = model.get_submodule(layer)
        carries_on = getattr(module, 'groups', 1) > 1
        # The same masks, but at one.
        at_one = masks + (1 - masks.detach()) if carries_on else masks
        hook = _masking(layer, at_one, units, image_of_rows)
        handles.append(module.register_forward_pre_hook(hook))
    try:
        (gradients,) = torch.autograd.grad(loss(model), masks)
    finally:
        for handle in handles:
            handle.remove()
    return gradients.square().sum(0)


def input_units(model: nn.Module, groups) -> dict[str, Tensor]:
    """The unit of each input channel by layer name, -1 for none."""
    found: dict[str, Tensor] = {}
    start = 0
    for group in groups:
        for member in group.members:
            layer = model.get_submodule(member.name.rpartition('.')[0])
            tied = getattr(layer, 'groups', 1) > 1  # its inputs go with its outputs
            if member.role != 'in' and not (tied and member.role == 'out'):
                continue
            width = getattr(layer, 'in_channels', None) or layer.in_features
            name = member.name.removesuffix('.weight')
            units = found.setdefault(name, torch.full((width,), -1))
            for i, channels in enumerate(member.index):
                if tied and not layer.transposed:  # whose weights list inputs first
                    channels = _inputs_of(layer, channels)
                units[channels] = start + i
        start += group.units
    return found


def _inputs_of(layer: nn.Module, outputs: np.ndarray) -> np.ndarray:
    """Input channels of the conv groups that make the output channels."""
    own = np.arange(layer.in_channels) // (layer.in_channels // layer.groups)
    made = outputs // (layer.out_channels // layer.groups)
    return np.flatnonzero(np.isin(own, made))


def _masking(layer: str, masks: Tensor, units: Tensor, image_of_rows):
    def hook(module: nn.Module, args: tuple[Tensor, ...]):
        x, *rest = args
        mask = torch.where(units >= 0, masks[:, units], 1)  # (N, C)
        if image_of_rows is not None:
            mask = mask[image_of_rows(layer, x)]  # (R, C)
        between = (1,) * (x.dim() - 2)
        if isinstance(module, nn.Linear):
            mask = mask.reshape(len(x), *between, -1)
        else:
            mask = mask.reshape(len(x), -1, *between)
        return x * mask, *rest

    return hook


def weight_fisher(model: nn.Module, losses, groups) -> Tensor:
    """The same from weights alone, (units,).

    A mask on an input channel scales the weights that read it, so its gradient is
    ``Σ w · ∂L_n/∂w`` over these weights. Those of a convolution with groups are found
    by the outputs that they make.

    Args:
        model: The module.
        losses: Computes the loss of each image from the module.
        groups: Its channel groups.
    """
    parameters = dict(model.named_parameters())
    total = torch.zeros(sum(g.units for g in groups), dtype=torch.float64)
    for loss in losses(model):
        gradients = torch.autograd.grad(
            loss, [*parameters.values()], retain_graph=True, allow_unused=True
        )
        products = {
            name: weight.detach() * (0 if gradient is None else gradient.detach())
            for (name, weight), gradient in zip(
                parameters.items(), gradients, strict=True
            )
        }
        parts = []
        for group in groups:
            part = torch.zeros(group.units, dtype=torch.float64)
            for member in group.members:
                layer = model.get_submodule(member.name.rpartition('.')[0])
                tied = (
                    getattr(layer, 'groups', 1) > 1 and products[member.name].dim() > 1
                )
                if member.role == 'in' or (tied and member.role == 'out'):
                    by_channel = products[member.name].transpose(0, member.dim)
                    sums = by_channel.flatten(1).sum(1).double()
                    part += sums[torch.from_numpy(member.index)].sum(1)
            parts.append(part)
        total += torch.cat(parts) ** 2
    return total
