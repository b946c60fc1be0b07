"""Multiply-accumulates by parameter, counted where the ops of a forward pass run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Product:
    """Operands and counts of one op that multiplies.

    Attributes:
        factors: Operands that may be a weight, the likeliest first, each with its
            dimension that counts output channels.
        macs: Multiply-accumulates.
        outputs: Elements put out.
        rows: Rows that it works on, such as images.
    """

    factors: tuple[tuple[Tensor, int], ...]
    macs: int
    outputs: int
    rows: int


#: Returns the products of an op, given its arguments and its output.
Formula = Callable[[tuple[Any, ...], Any], list[Product]]
FORMULAS: dict[str, Formula] = {}


def formula(*ops: str) -> Callable[[Formula], Formula]:
    """Register the formula of ops, given by the names of their schemas."""

    def register(function: Formula) -> Formula:
        for op in ops:
            if op in FORMULAS:
                raise ValueError(f'{op} has two formulas')
            FORMULAS[op] = function
        return function

    return register


@formula('aten::convolution')
def _convolution(args: tuple[Any, ...], output: Tensor) -> list[Product]:
    value, weight, transposed, groups = args[0], args[1], args[6], args[8]
    # A transposed convolution uses each weight at each input position.
    positions = (value if transposed else output).numel() // weight.shape[0]
    macs = positions * weight.numel()
    # Conv groups, which a grouped one loses whole, lie along dimension 0 always.
    factors = ((weight, int(transposed and groups == 1)),)
    return [Product(factors, macs, output.numel(), len(value))]


@formula('torchvision::deform_conv2d')
def _deform_conv(args: tuple[Any, ...], output: Tensor) -> list[Product]:
    weight = args[1]
    macs = output.numel() // weight.shape[0] * weight.numel()
    return [Product(((weight, 0),), macs, output.numel(), len(args[0]))]


@formula('aten::mm', 'aten::bmm')
def _matmul(args: tuple[Any, ...], output: Tensor) -> list[Product]:
    left, right = args[:2]
    macs = left.numel() * right.shape[-1]
    dim = left.dim() - 1  # layers have their weight on the right, as x · Wᵀ
    factors = ((right, dim), (left, dim - 1))
    return [Product(factors, macs, output.numel(), len(left))]


@formula('aten::addmm', 'aten::addmm_', 'aten::baddbmm', 'aten::baddbmm_')
def _add_matmul(args: tuple[Any, ...], output: Tensor) -> list[Product]:
    return _matmul(args[1:], output)


@formula('aten::mkldnn_rnn_layer')
def _mkldnn_rnn(args: tuple[Any, ...], output: Any) -> list[Product]:
    return _recurrent(args[0], args[1:5])


@formula('aten::_cudnn_rnn')
def _cudnn_rnn(args: tuple[Any, ...], output: Any) -> list[Product]:
    return _recurrent(args[0], args[1])


def _recurrent(value: Tensor, weights: Any) -> list[Product]:
    """Each step of each sequence uses every weight once."""
    steps = value.numel() // value.shape[-1]
    return [
        Product(((w, 0),), steps * w.numel(), steps * w.shape[0], len(value))
        for w in weights
        if w.dim() == 2
    ]


@formula(
    'aten::_scaled_dot_product_flash_attention',
    'aten::_scaled_dot_product_flash_attention_for_cpu',
    'aten::_scaled_dot_product_efficient_attention',
    'aten::_scaled_dot_product_cudnn_attention',
)
def _attention(args: tuple[Any, ...], output: Any) -> list[Product]:
    """Queries (N, H, L, D) meet keys (N, H, S, D), and the scores the values."""
    queries, keys = args[:2]
    attended = output[0].numel()
    macs = (queries.numel() + attended) * keys.shape[-2]
    return [Product((), macs, attended, len(queries))]


class WatchWork(TorchDispatchMode):
    """Counts the work of each parameter while a model runs.

    The weight of an op may be a parameter, a view or a part of one, or computed from
    parameters alone. Work of ops without such an operand is ``unassigned``.

    Args:
        parameters: Parameters by name.
        constants: Tensors that do not depend on inputs, such as buffers.
        count: Called with the name of a parameter, the product that it is a factor of,
            and the dimension of the parameter that counts output channels.

    Attributes:
        unassigned: Multiply-accumulates of all ops without a parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        constants: list[Tensor],
        count: Callable[[str, Product, int], None],
    ) -> None:
        super().__init__()
        self.unassigned = 0
        self._parameters = parameters
        self._count = count
        # Several parameters may be parts of one storage.
        self._places: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            self._places.setdefault(_address(parameter), []).append(name)
        # The parameters that other storages are computed from.
        self._origins: dict[int, tuple[str, ...]] = {_address(c): () for c in constants}
        self._held: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an op and take in what it does."""
        kwargs = kwargs or {}
        op = func._schema.name if hasattr(func, '_schema') else ''
        if op and op not in FORMULAS and func is not torch.ops.prim.device.default:
            with self:  # in inference mode some ops are not taken apart yet
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if op in FORMULAS:
            for product in FORMULAS[op](args, output):
                self._assign(product)
        else:
            self._follow((args, kwargs), output)
        return output

    def _assign(self, product: Product) -> None:
        best: tuple[str, Tensor, int] | None = None
        for factor, dim in product.factors:
            names = self._names(factor)
            is_parameter = _address(factor) in self._places
            if names and (best is None or is_parameter):
                best = self._likeliest(names, factor), factor, dim
                if is_parameter:
                    break
        if best is None:
            self.unassigned += product.macs
        else:
            name, factor, dim = best
            self._count(name, product, _dim_of(factor, dim, self._parameters[name]))

    def _likeliest(self, names: tuple[str, ...], factor: Tensor) -> str:
        """Return the parameter that a computed weight has its entries from."""
        sizes = {name: self._parameters[name].numel() for name in names}
        return max(names, key=lambda n: (sizes[n] == factor.numel(), sizes[n]))

    def _names(self, tensor: Tensor) -> tuple[str, ...] | None:
        """Return the parameters that a tensor was computed from; None with others."""
        if tensor.layout != torch.strided:
            return None
        address = _address(tensor)  # 0 if there are no elements, or none in memory
        if address and address in self._places:
            return (self._part(self._places[address], tensor),)
        if tensor.dim() == 0:  # a factor on a weight doesn't make it another one
            return self._origins.get(address, ())
        return self._origins.get(address) if address else None

    def _part(self, names: list[str], tensor: Tensor) -> str:
        """Return which of the parameters in one storage holds the tensor's start."""
        starts = {n: self._parameters[n].storage_offset() for n in names}
        before = [n for n in names if starts[n] <= tensor.storage_offset()]
        return max(before or names, key=lambda n: starts[n])

    def _follow(self, operands: Any, output: Any) -> None:
        """Remember what is computed from parameters alone, and forget what is not."""
        tensors = [x for x in tree_leaves(operands) if isinstance(x, Tensor)]
        origins = [self._names(x) for x in tensors]
        known = [names for names in origins if names is not None]
        is_known = bool(known) and len(known) == len(origins)
        for result in tree_leaves(output):
            if not isinstance(result, Tensor) or result.layout != torch.strided:
                continue
            address = _address(result)
            if address in self._places or not address:
                continue
            if is_known:
                names = dict.fromkeys(n for part in known for n in part)
                self._origins[address] = tuple(names)
                self._held.append(result)
            else:
                self._origins.pop(address, None)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _dim_of(factor: Tensor, dim: int, parameter: Tensor) -> int:
    """Return the dimension of a parameter that is ``dim`` of a view of it."""
    size, stride = factor.shape[dim], factor.stride(dim)
    dims = sorted(range(parameter.dim()), key=lambda d: d != dim)
    same_stride = [d for d in dims if parameter.stride(d) == stride]
    same_size = [d for d in dims if parameter.shape[d] == size]
    both = [d for d in same_stride if d in same_size]
    wide = [d for d in same_stride if parameter.shape[d] > 1]
    return (both or wide or same_size or dims)[0]
