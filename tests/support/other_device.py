"""A second device with real values, for machines that have only a CPU.

Its tensors say that they are on ``meta``, the one device other than the CPU on which
torch's autograd works without a driver, but hold values, which are computed on the
CPU. As on a GPU, an op refuses tensors of both devices, `numpy` works after `cpu` only,
and functions given ``device=DEVICE`` make tensors there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from mmengine.structures import instance_data
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = 'meta'
_MAKE = torch.tensor
#: Ops whose operands may be on several devices.
MOVES = (aten.copy_.default, aten._to_copy.default)
#: Ops that take indices on the CPU as well, as the second operand.
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)


class DeviceTensor(Tensor):
    """A tensor of the device.

    Attributes:
        on_cpu: Its values, in memory that views of it share.
    """

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> DeviceTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=torch.device(DEVICE),
        )
        tensor.on_cpu = on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = DeviceTensor(self.on_cpu.clone())
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_as_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        is_number = isinstance(value, int | float)
        value = torch.tensor(value, dtype=self.dtype) if is_number else value
        super().__setitem__(_as_index(index), value)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        options = {'dtype': self.dtype, 'device': self.device} | options
        return torch.tensor(data, **options)

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def __repr__(self) -> str:
        return f'DeviceTensor({self.on_cpu!r})'


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    """Let ``device=DEVICE`` make tensors with values while it is active."""
    future = torch.__future__
    with ExitStack() as stack:
        # Setting `data` of a parameter would not set its values.
        name = 'get_overwrite_module_params_on_conversion'
        stack.enter_context(mock.patch.object(future, name, lambda: True))
        # Torch fills new tensors with such values out of the dispatcher's sight.
        stack.enter_context(mock.patch.object(torch, 'tensor', _tensor))
        index_types = instance_data.IndexType | DeviceTensor
        stack.enter_context(mock.patch.object(instance_data, 'IndexType', index_types))
        for module in [m for n, m in sys.modules.items() if n.startswith('mmcv.ops.')]:
            if hasattr(module, 'ext_module'):
                functions = _Functions(module.ext_module)
                stack.enter_context(mock.patch.object(module, 'ext_module', functions))
        stack.enter_context(_Factories())
        yield


def _as_index(index: Any) -> Any:
    """Return an index with tensors in the place of lists of numbers."""
    if isinstance(index, tuple):
        return tuple(map(_as_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _tensor(data: Any, device: Any = None, **options: Any) -> Tensor:
    values = _MAKE(data, device='cpu', **options)
    is_there = device is not None and torch.device(device).type == DEVICE
    return DeviceTensor(values) if is_there else values


class _Functions:
    """Functions of an extension of mmcv, which torch's dispatcher does not know."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            values = tree_map(_on_cpu, (args, kwargs))
            result = getattr(self.extension, name)(*values[0], **values[1])
            is_there = any(
                isinstance(x, DeviceTensor) for x in tree_leaves((args, kwargs))
            )
            return tree_map(_on_device, result) if is_there else result

        return call


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op on values; put its results where a device of its own would."""
    if func is aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
        return args[0]  # a factor of a tensor arrives as the number that it is
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    _check_devices(func, args, tensors)
    is_there = any(isinstance(t, DeviceTensor) for t in tensors)
    cpu_kwargs = kwargs
    if kwargs.get('device') is not None:
        is_there = torch.device(kwargs['device']).type == DEVICE
        cpu_kwargs = {**kwargs, 'device': torch.device('cpu')}
    if func is aten.copy_.default:
        is_there = isinstance(args[0], DeviceTensor)
    values = tree_map(_on_cpu, (args, cpu_kwargs))
    result = func(*values[0], **values[1])
    if not is_there:
        return result
    result = tree_map(_on_device, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _on_cpu(x: Any) -> Any:
    return x.on_cpu if isinstance(x, DeviceTensor) else x


def _on_device(x: Any) -> Any:
    return DeviceTensor(x) if isinstance(x, Tensor) else x


def _check_devices(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func in MOVES or not any(isinstance(t, DeviceTensor) for t in tensors):
        return
    if func in INDEXING and isinstance(args[0], DeviceTensor):
        tensors = [args[0], *args[2:3]]
    # A number in a tensor may come from the CPU.
    if any(not isinstance(t, DeviceTensor) and t.dim() for t in tensors):
        devices = [(t.device.type, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f'{func}: expected all tensors on one device, got {devices}')
