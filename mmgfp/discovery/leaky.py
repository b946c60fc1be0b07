"""Activations that let something through, so that no layer is dead on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

T = TypeVar('T')

#: ReLU, and the functions that ReLU6 calls; those that end in ``_`` write into their
#: input.
RELU = (
    *(torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu),
    *(F.relu6, F.hardtanh, F.hardtanh_),
)
SLOPE = 0.25
#: Calls after which a loop is taken to wait for zeros that never come.
MOST_CALLS = 10_000


class LeakyActivations(TorchFunctionMode):
    """Let ReLU and its like keep a slope everywhere.

    A layer that is dead on the batch hides how what follows treats its channels. Masked
    and compact models agree under any activation of single elements, unless code looks
    at the values.

    Raises:
        RuntimeError: After `MOST_CALLS`.

    Examples:
        >>> with LeakyActivations():
        ...     F.relu(torch.tensor([-4.0, 2.0]))
        tensor([-1.,  2.])
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or its leaky stand-in."""
        kwargs = dict(kwargs or {})
        x: Any = args[0] if args else kwargs.get('input')
        if func not in RELU or not x.is_floating_point():
            return func(*args, **kwargs)
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise RuntimeError(f'more than {MOST_CALLS} activations')
        in_place = func.__name__.endswith('_') or bool(kwargs.get('inplace'))
        return F.leaky_relu(x, SLOPE, in_place)


def in_leaky_mode(call: Callable[[nn.Module], T]) -> Callable[[nn.Module], T]:
    """Return ``call`` as it runs under `LeakyActivations`."""

    def leaky(model: nn.Module) -> T:
        with LeakyActivations():
            return call(model)

    return leaky
