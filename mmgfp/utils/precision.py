"""Double precision, even for code that asks for single precision by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmgfp.utils.tree import tree_map

#: Types that mean double precision while the mode is on.
NARROW = (torch.float32, torch.float16, torch.bfloat16)
NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InDouble(TorchFunctionMode):
    """Let torch compute with floats in double precision only.

    Code of a model in double precision still creates single-precision constants, such
    as the positions of a transformer, and some ops refuse to mix them with its weights.
    Tensors that existed before are widened where they are used; values written into
    them take on their precision.

    Examples:
        >>> import torch
        >>> with InDouble():
        ...     x = torch.ones(2, dtype=torch.float32).float()
        >>> x.dtype
        torch.float64
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` on widened arguments and widen its result."""
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if name == '__get__':  # attributes such as ``data`` must remain views
            return func(*args, **kwargs)
        if func in NARROWING:
            return args[0].double()
        # In-place ops must return the tensor itself, so it cannot be widened.
        if name == '__setitem__' or (name.endswith('_') and not name.endswith('__')):
            target, *others = args
            return func(target, *(_like(target, x) for x in others), **kwargs)
        return tree_map(
            _widened,
            func(*tree_map(_widened, tuple(args)), **tree_map(_widened, dict(kwargs))),
        )


def _widened(x: Any) -> Any:
    """Return a narrow float tensor, or the name of its type, in double precision."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x in NARROW else x
    if isinstance(x, Tensor) and x.dtype in NARROW:
        return x.double()
    return x


def _like(target: Any, x: Any) -> Any:
    """Return a float tensor in the precision of the tensor it is written into."""
    if isinstance(x, Tensor) and isinstance(target, Tensor):
        return x.to(target.dtype) if x.is_floating_point() else x
    return x
