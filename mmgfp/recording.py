"""What each layer works on, seen in one forward pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.costs import LayerWork
from mmgfp.groups import LAYER_TYPES

Forward = Callable[[nn.Module], Any]


@torch.no_grad()
def record_work(
    model: nn.Module, forward: Forward, images: int
) -> dict[str, LayerWork]:
    """Run ``forward`` once and count the positions that each layer works on.

    Args:
        model: The module; Conv and FC layers inside it are watched.
        forward: Calls the module.
        images: Number of images in that call; results are for one.

    Returns:
        dict: Work by the name of the layer's weight; layers that did not run are
        left out.
    """
    work: dict[str, LayerWork] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            out_dim, positions = _positions(module, args[0], output)
            out_positions = output.numel() / _out_channels(module)
            before = work.get(name, LayerWork(0.0, 0.0))
            work[name] = LayerWork(
                before.macs_positions + positions / images,
                before.out_positions + out_positions / images,
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


def _out_channels(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _positions(module: Any, x: Tensor, output: Tensor) -> tuple[int, float]:
    """The weight's output dimension, and how often each weight element is used."""
    if getattr(module, 'transposed', False):
        return 1, x.numel() / module.in_channels
    return 0, output.numel() / _out_channels(module)


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


@contextmanager
def _numpy_state() -> Iterator[None]:
    state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(state)
        random.setstate(python_state)


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
