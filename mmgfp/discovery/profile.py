"""The work of each layer, recorded in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.layers import is_layer, output_dim
from mmgfp.utils.trial_runs import Forward, undisturbed


@torch.no_grad()
def profile_layers(
    model: nn.Module,
    forward: Forward,
    images: int,
    rows: Mapping[str, int] | None = None,
) -> dict[str, LayerProfile]:
    """Run ``forward`` once and count the positions that each layer works on.

    Args:
        model: The module; its Conv and FC layers are watched.
        forward: Calls the module.
        images: Number of images in that call; results are for one.
        rows: Rows to count for one image, however many the call gives, by the name of
            a module whose layers work on something else than images, such as RoIs.

    Returns:
        dict: Profiles by the name of the weight, for all layers that ran.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
        >>> profiles = profile_layers(net, lambda m: m(torch.ones(4, 3, 8, 8)), 4)
        >>> {name: p.macs_positions for name, p in profiles.items()}
        {'0.weight': 36.0, '2.weight': 1.0}
    """
    profiles: dict[str, LayerProfile] = {}

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        # It uses each weight at each input position; conv groups go from dimension 0.
        is_transposed = output_dim(module) == 1
        out_dim = int(is_transposed and module.groups == 1)
        out_positions = output.numel() / module.weight.shape[out_dim]
        uses = args[0].numel() / module.in_channels if is_transposed else out_positions
        share = _image_share(name, len(args[0]), images, rows or {})
        so_far = profiles.get(name, LayerProfile(0.0, 0.0))
        profiles[name] = LayerProfile(
            so_far.macs_positions + uses * share,
            so_far.out_positions + out_positions * share,
            out_dim,
        )

    names = {m: f'{n}.weight' for n, m in model.named_modules() if is_layer(m)}
    handles = [module.register_forward_hook(hook) for module in names]
    try:
        with undisturbed(model):
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return profiles


def _image_share(name: str, count: int, images: int, rows: Mapping[str, int]) -> float:
    """Return the part of a layer's work on ``count`` rows that counts for one image."""
    per_image = [n for module, n in rows.items() if name.startswith(f'{module}.')]
    if per_image and count not in (0, images):
        return per_image[0] / count
    return 1 / images
