"""Buffers of channel width, such as those of frozen batch norms, in the graph.

A buffer needs no gradient, so that the graph of a loss shows neither a buffer nor
what is computed from buffers alone. While a model runs for tracing, each buffer that
may hold channels has a twin, a leaf that shares its memory. Whatever is computed from
buffers is computed from their twins as well, and where it meets a tensor that needs a
gradient, the twin takes part: labels then reach buffers as they reach parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmgfp.utils.tree import tree_map

#: Under this name a twin knows its buffer's name.
NAME = 'mmgfp_buffer'
#: Under this key a node knows the buffers whose entries are channels of its result.
KEY = 'mmgfp_channel_buffers'
#: Functions in which a buffer counts as a number, as in a loss: what is summed over
#: stays, whoever made it.
PRODUCTS = frozenset(
    ('linear', 'bilinear', 'matmul', 'mm', 'addmm', 'bmm', 'baddbmm', 'einsum', 'mv')
    + ('dot', 'tensordot', 'rmatmul', 'scaled_dot_product_attention')
)
#: Norms with buffers as running statistics, which torch refuses to differentiate.
NORMS = frozenset(('batch_norm', 'instance_norm'))


def buffer_name(leaf: Tensor) -> str | None:
    """Return the name of the buffer of which ``leaf`` is the twin; None if of none."""
    return getattr(leaf, NAME, None)


def channel_dim(shape: Sequence[int]) -> int | None:
    """Return the dimension along which a buffer of that shape may hold channels.

    Examples:
        >>> [channel_dim(s) for s in [(8,), (1, 8, 1, 1), (8, 1, 3, 3), (8, 8), ()]]
        [0, 1, 0, None, None]
    """
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    if len(wide) == 1:
        return wide[0]
    # One filter for each channel, as depth-wise convolutions have them.
    is_filter = len(shape) > 2 and shape[0] > 1 and shape[1] == 1
    return 0 if is_filter else None


@contextmanager
def watch_buffers(model: nn.Module) -> Iterator[None]:
    """Let buffers of channel width take part in the graph of all that runs inside.

    Args:
        model: The module that is about to be traced.

    Examples:
        >>> net = nn.BatchNorm2d(2).eval()
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> with watch_buffers(net):
        ...     y = x * (net.running_var + 1).rsqrt()
        >>> y.grad_fn.next_functions[1][0].name()
        'RsqrtBackward0'
    """
    with _BufferMode(model):
        yield


class _BufferMode(TorchFunctionMode):
    """Calls torch's functions with the twins of buffers where gradients are needed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(b): n for n, b in model.named_buffers()}
        # The tensors themselves are held as well, so that no identity is used again.
        self.twins: dict[int, tuple[Tensor, Tensor]] = {
            id(b): (b, _twin(n, b))
            for n, b in model.named_buffers()
            if b.is_floating_point() and channel_dim(b.shape) is not None
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors([*args, *kwargs.values()]))
        constants = [t for t in tensors if id(t) in self.twins]
        name = getattr(func, '__name__', '').strip('_')
        if not constants or name in PRODUCTS:
            return func(*args, **kwargs)
        if name in NORMS:
            return self._norm(func, args, kwargs)
        if _is_in_place(func) and args[0] is constants[0]:
            del self.twins[id(constants[0])]  # the twin of a result would be outdated
            return func(*args, **kwargs)
        if len(constants) == len(tensors):
            return self._constant(func, args, kwargs)
        needs_grad = any(t.requires_grad for t in tensors)
        if not (needs_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        return self._with_twins(func, args, kwargs)

    def _with_twins(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``func`` on twins; on buffers where it has no gradient for them."""
        first, *rest = args
        if func.__name__.startswith('conv') and id(first) in self.twins:
            return func(*args, **kwargs)  # what a layer reads is no channel of its own
        try:
            return func(*tree_map(self._twin_of, [first, *rest]), **kwargs)
        except (RuntimeError, NotImplementedError):
            return func(*args, **kwargs)

    def _constant(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute a constant from buffers, and its twin from theirs."""
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            try:
                with torch.enable_grad():
                    twin = func(*tree_map(self._twin_of, list(args)), **kwargs)
            except (RuntimeError, NotImplementedError):
                return result
            if twin.grad_fn is not None or buffer_name(twin) is not None:
                self.twins[id(result)] = (result, twin)
        return result

    def _norm(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Note on the result of a norm which buffers it reads."""
        result = func(*args, **kwargs)
        names = [self.names.get(id(t)) for t in _tensors([*args, *kwargs.values()])]
        if result.grad_fn is not None:
            result.grad_fn.metadata[KEY] = [n for n in names if n is not None]
        return result

    def _twin_of(self, x: Any) -> Any:
        return self.twins[id(x)][1] if id(x) in self.twins else x


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the floating-point tensors among arguments, and in lists of them."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.is_floating_point():
                yield arg
        elif type(arg) in (list, tuple):
            yield from _tensors(arg)


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, '__name__', '')
    return (name.endswith('_') and not name.endswith('__')) or name in (
        '__setitem__', '__iadd__', '__isub__', '__imul__', '__idiv__', '__itruediv__',
    )  # fmt: skip


def _twin(name: str, buffer: Tensor) -> Tensor:
    # A parameter, since rows of images are not followed into parameters.
    twin = nn.Parameter(buffer.detach())
    setattr(twin, NAME, name)
    return twin
