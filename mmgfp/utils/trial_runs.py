"""Running a model for a look at it: nothing of it, or of random states, changes."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from mmgfp.utils.tree import tree_tensors

#: Calls the module it is given and returns its outputs.
Forward = Callable[[nn.Module], Any]
#: Computes the training loss, a scalar, of the module it is given.
LossFunction = Callable[[nn.Module], Tensor]
#: Words of errors of torch, CUDA and cuDNN that have no type of their own.
OUT_OF_MEMORY = (
    'out of memory',
    'not enough memory',
    "can't allocate memory",
    'cannot allocate memory',
    'alloc_failed',
)


def copy_module(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model``.

    Some heads keep raw outputs from one iteration to the next, which `copy.deepcopy`
    refuses as long as they belong to a graph. The copy gets them without their graph.
    """
    kept = (
        tensor
        for module in model.modules()
        for value in vars(module).values()
        for tensor in tree_tensors(value)
    )
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn
    }
    return copy.deepcopy(model, memo)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the CPU.

    Examples:
        >>> is_out_of_memory(RuntimeError('CUDA error: out of memory'))
        True
        >>> is_out_of_memory(RuntimeError('shape [2, 6] is invalid'))
        False
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(w in words for w in OUT_OF_MEMORY)


class FrozenParameters:
    """The parameters of a model that need no gradient, as they were.

    Args:
        model: The model, which may change them.

    Examples:
        >>> net = nn.Linear(2, 1).requires_grad_(False)
        >>> before = FrozenParameters(net)
        >>> net.bias.data = net.bias.data + 1
        >>> before.changed()
        {'weight': False, 'bias': True}
        >>> before.restore()
        >>> any(before.changed().values())
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (name, p, p.data, p._version, p.detach().clone())
            for name, p in model.named_parameters()
            if not p.requires_grad
        ]

    def changed(self) -> dict[str, bool]:
        """Return which of them have been written to since, by name."""
        return {
            name: p.data_ptr() != data.data_ptr()  # as `p.data = ...` does
            or p._version != version  # seen even where nothing differs yet
            or not _equal(p, value)
            for name, p, data, version, value in self._before
        }

    def values(self) -> dict[str, Tensor]:
        """Return their values as they were, by name."""
        return {name: value for name, *_, value in self._before}

    def restore(self) -> None:
        """Change them back."""
        for _, p, data, _, value in self._before:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            if not _equal(p, value):
                p.data.copy_(value)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal; NaN counts as equal to itself."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers, training modes and random states that a trial run changes.

    Parameters that need no gradient are restored as well: a model's own code may update
    them, as those of a teacher that follows the model.

    Examples:
        >>> import torch
        >>> norm = torch.nn.BatchNorm2d(2)
        >>> with undisturbed(norm):
        ...     output = norm(torch.ones(4, 2, 3, 3))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(m, m.training) for m in model.modules()]
    frozen = FrozenParameters(model)
    try:
        with random_states_restored(model):
            yield
    finally:
        frozen.restore()
        with torch.no_grad():
            for module, key, buffer, value in buffers:
                # A run may resize a buffer, or put another tensor in its place.
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                buffer.copy_(value)
                module._buffers[key] = buffer
        for module, training in modes:
            # Not `train()`, which some models override to keep parts in eval mode.
            module.training = training


def seed_all(seed: int) -> None:
    """Let the random numbers of Python, NumPy and torch start from ``seed``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def random_states_restored(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch, on the model's devices, NumPy and Python."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def modules_with_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that take hooks, with their names: all that no jit compiled."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the tensors that modules with parameters return, nested ones too."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.extend(tree_tensors(output))

    handles = [
        module.register_forward_hook(hook)
        for _, module in modules_with_hooks(model)
        if any(True for _ in module.parameters())
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def all_parameters_require_grad(model: nn.Module) -> Iterator[None]:
    """Let all parameters require gradients, so that frozen ones don't end the graph."""
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
    """Let checkpointed parts of models leave a graph as all other parts do.

    `torch.utils.checkpoint.checkpoint` saves nothing of what it runs, or runs it again
    whenever what it saved is read. In this context it simply calls the function.
    """
    original = torch.utils.checkpoint.checkpoint
    # Every module that imported the function holds it, under any name.
    places = [
        (names, name)
        for names in [getattr(m, '__dict__', {}) for m in list(sys.modules.values())]
        for name, value in list(names.items())
        if value is original
    ]
    for names, name in places:
        names[name] = _call
    # What holds it in another way, as in a `functools.partial`, still comes here.
    reentrant: Any = torch.utils.checkpoint.CheckpointFunction
    reentrant.apply = lambda function, preserve_rng_state, *args: function(*args)
    try:
        yield
    finally:
        del reentrant.apply  # which it inherits
        for names, name in places:
            names[name] = original


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
    """Take the arguments of `checkpoint` and only call the function."""
    return function(*args, **kwargs)


@contextmanager
def whole_graph(model: nn.Module) -> Iterator[None]:
    """Let a loss run for a look at its whole graph, and leave the model as it was."""
    with (
        undisturbed(model),
        all_parameters_require_grad(model),  # else frozen stages cut the graph
        without_checkpointing(),
        torch.enable_grad(),
    ):
        yield
