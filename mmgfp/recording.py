"""What each layer works on, seen in one forward pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.costs import LayerWork
from mmgfp.groups import LAYER_TYPES
from mmgfp.nests import tensors_in

Forward = Callable[[nn.Module], Any]


@torch.no_grad()
def record_work(
    model: nn.Module,
    forward: Forward,
    images: int,
    rows: Mapping[str, int] | None = None,
) -> dict[str, LayerWork]:
    """Run ``forward`` once and count the positions that each layer works on.

    Args:
        model: The module; Conv and FC layers inside it are watched.
        forward: Calls the module.
        images: Number of images in that call; results are for one.
        rows: Rows per image to count, by the name of a module, for the layers inside
            that work on anything but images, such as RoIs, however many of them the
            call gives.

    Returns:
        dict: Work by the name of the layer's weight; layers that did not run are
        left out.
    """
    work: dict[str, LayerWork] = {}
    fixed = rows or {}

    def share(name: str, seen: int) -> float:
        """The part of a call on ``seen`` rows that counts for one image."""
        found = [n for part, n in fixed.items() if name.startswith(f'{part}.')]
        return found[0] / seen if found and seen not in (0, images) else 1 / images

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            out_dim = 1 if getattr(module, 'transposed', False) else 0
            out_positions = output.numel() / module.weight.shape[out_dim]
            # A transposed convolution uses each weight once per input position.
            positions = (
                args[0].numel() / module.in_channels if out_dim else out_positions
            )
            before = work.get(name, LayerWork(0.0, 0.0))
            part = share(name, len(args[0]))
            work[name] = LayerWork(
                before.macs_positions + positions * part,
                before.out_positions + out_positions * part,
                out_dim,
            )

        return hook

    handles = [
        module.register_forward_hook(watch(f'{name}.weight'))
        for name, module in model.named_modules()
        if isinstance(module, LAYER_TYPES)
    ]
    try:
        with undisturbed(model):
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return work


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers, training modes and random states that a trial run changes."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    modes = [(m, m.training) for m in model.modules()]
    try:
        with _numpy_state(), torch.random.fork_rng(devices):
            yield
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        for module, training in modes:
            module.training = training
            _forget_graph(vars(module))


def _forget_graph(attributes: dict[str, Any]) -> None:
    """Cut the graph off tensors that a module keeps, so that it can be copied."""
    for name, value in attributes.items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            attributes[name] = value.detach()
        elif isinstance(value, list | tuple) and any(
            x.grad_fn for x in value if isinstance(x, Tensor)
        ):
            attributes[name] = type(value)(
                x.detach() if isinstance(x, Tensor) else x for x in value
            )


@contextmanager
def _numpy_state() -> Iterator[None]:
    state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(state)
        random.setstate(python_state)


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tensors that modules with parameters return, nested ones too."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.extend(tensors_in(output))

    blocks = [m for m in model.modules() if any(True for _ in m.parameters())]
    handles = [m.register_forward_hook(hook) for m in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def all_parameters_require_grad(model: nn.Module) -> Iterator[None]:
    """Let no frozen parameter cut the graph."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
