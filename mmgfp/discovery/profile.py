"""What each layer works on, seen in one forward pass."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from mmgfp.groups import is_layer
from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.tree import tensors_in

Forward = Callable[[nn.Module], Any]
LossFunction = Callable[[nn.Module], Tensor]


@torch.no_grad()
def profile_layers(
    model: nn.Module,
    forward: Forward,
    images: int,
    rows: Mapping[str, int] | None = None,
) -> dict[str, LayerProfile]:
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
    profiles: dict[str, LayerProfile] = {}
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
            before = profiles.get(name, LayerProfile(0.0, 0.0))
            part = share(name, len(args[0]))
            profiles[name] = LayerProfile(
                before.macs_positions + positions * part,
                before.out_positions + out_positions * part,
                out_dim,
            )

        return hook

    handles = [
        module.register_forward_hook(watch(f'{name}.weight'))
        for name, module in model.named_modules()
        if is_layer(module)
    ]
    try:
        with undisturbed(model):
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return profiles


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


def copy_module(model: nn.Module) -> nn.Module:
    """A deep copy; what modules keep of a forward pass loses its graph.

    Some heads keep raw outputs from one iteration to the next, which `copy.deepcopy`
    refuses as long as they belong to a graph.
    """
    kept = (
        tensor
        for module in model.modules()
        for value in vars(module).values()
        for tensor in tensors_in(value)
    )
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn
    }
    return copy.deepcopy(model, memo)


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


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Let checkpointed parts of models leave their graph as all others do.

    `torch.utils.checkpoint.checkpoint` keeps nothing of what it runs, or runs it again
    whenever somebody looks at what was saved. Here it simply calls the function.
    """
    kept = torch.utils.checkpoint.checkpoint
    places = [
        (names, name)
        for names in [getattr(m, '__dict__', {}) for m in list(sys.modules.values())]
        for name, value in list(names.items())
        if value is kept
    ]
    for names, name in places:  # it may have been imported by any name
        names[name] = _call
    try:
        yield
    finally:
        for names, name in places:
            names[name] = kept


def _call(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    context_fn: Any = None,
    determinism_check: str = '',
    debug: bool = False,
    **kwargs: Any,
) -> Any:
    """What `checkpoint` is told and what it computes, without what it does about it."""
    return function(*args, **kwargs)
