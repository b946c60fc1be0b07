"""The work of each layer, recorded in one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.discovery.work import Product, WatchWork
from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.layers import is_layer, output_dim
from mmgfp.utils.trial_runs import Forward, modules_with_hooks, undisturbed

logger = logging.getLogger('mmgfp')

#: The share of work without a parameter from which on it is mentioned.
NOTABLE = 0.01


@torch.no_grad()
def profile_layers(
    model: nn.Module,
    forward: Forward,
    images: int,
    rows: Mapping[str, int] | None = None,
) -> dict[str, LayerProfile]:
    """Run ``forward`` once and count the positions that each weight works on.

    What counts are the ops that run, whoever calls them: modules that share a
    parameter, functions, attention. Products of two activations are no layer's work.

    Args:
        model: The module; the work of its parameters is counted.
        forward: Calls the module.
        images: Number of images in that call; results are for one.
        rows: Rows to count for one image, however many the call gives, by the name of
            a module whose layers work on something else than images, such as RoIs.

    Returns:
        dict: Profiles by the name of the weight, for all weights that were used.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
        >>> profiles = profile_layers(net, lambda m: m(torch.ones(4, 3, 8, 8)), 4)
        >>> {name: p.macs_positions for name, p in profiles.items()}
        {'0.weight': 36.0, '2.weight': 1.0}
    """
    counter = _Counter(model, images, rows or {})
    work = WatchWork(counter.parameters, list(model.buffers()), counter.count)
    with undisturbed(model), counter.watch_modules(), _slow_attention(), work:
        forward(model)
    counted = sum(
        p.macs_positions * counter.parameters[n].numel()
        for n, p in counter.profiles.items()
    )
    unassigned = work.unassigned / images
    if unassigned > NOTABLE * counted:
        logger.warning(
            '%.3g of %.3g multiply-accumulates multiply no parameter, as in attention: '
            'costs leave them out',
            unassigned,
            unassigned + counted,
        )
    return counter.profiles


class _Counter:
    """Adds up the work of each parameter for one image.

    Attributes:
        parameters: The model's parameters by name.
        profiles: Their work so far.
    """

    def __init__(self, model: nn.Module, images: int, rows: Mapping[str, int]) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.profiles: dict[str, LayerProfile] = {}
        self._images = images
        self._rows = rows
        self._calls: list[int | None] = []  # rows of the modules that are running

    def count(self, name: str, product: Product, out_dim: int) -> None:
        """Add a product with the parameter called ``name``."""
        parameter = self.parameters[name]
        rows = self._calls[-1] if self._calls else None
        count = product.rows if rows is None else rows
        share = _image_share(name, count, self._images, self._rows)
        so_far = self.profiles.get(name, LayerProfile(0.0, 0.0))
        self.profiles[name] = LayerProfile(
            so_far.macs_positions + product.macs / parameter.numel() * share,
            so_far.out_positions + product.outputs / parameter.shape[out_dim] * share,
            out_dim,
        )

    @contextmanager
    def watch_modules(self) -> Iterator[None]:
        """Count layers whose ops aren't seen, and know how many rows a layer gets."""
        names = {id(p): n for n, p in self.parameters.items()}
        handles = []
        for _, module in modules_with_hooks(self.model):
            if any(True for _ in module.parameters(recurse=False)):
                weight = names.get(id(getattr(module, 'weight', None)))
                before, after = self._hooks(weight if is_layer(module) else None)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, weight: str | None) -> tuple[Callable, Callable]:
        seen: list[LayerProfile | None] = []

        def before(module: Any, args: Any) -> None:
            is_batch = bool(args) and isinstance(args[0], Tensor) and args[0].dim() > 0
            inherited = self._calls[-1] if self._calls else None
            self._calls.append(len(args[0]) if is_batch else inherited)
            seen.append(self.profiles.get(weight or ''))

        def after(module: Any, args: Any, output: Any) -> None:
            is_unseen = seen.pop() is self.profiles.get(weight or '')
            if weight and is_unseen and args and isinstance(output, Tensor):
                product = _module_product(module, args[0], output)
                self.count(weight, product, output_dim(module))
            self._calls.pop()

        return before, after


def _module_product(module: Any, value: Tensor, output: Tensor) -> Product:
    """Return the work of a layer with an op of its own, such as mmcv's deformable."""
    weight, out_dim = module.weight, output_dim(module)
    # A transposed convolution uses each weight at each input position.
    positions = (value if out_dim else output).numel() // weight.shape[0]
    factors = ((weight, out_dim),)
    return Product(factors, positions * weight.numel(), output.numel(), len(value))


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Let attention run as separate ops instead of a fused one that hides weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _image_share(name: str, count: int, images: int, rows: Mapping[str, int]) -> float:
    """Return the part of a layer's work on ``count`` rows that counts for one image."""
    per_image = [n for module, n in rows.items() if name.startswith(f'{module}.')]
    if per_image and count not in (0, images):
        return per_image[0] / count
    return 1 / images
