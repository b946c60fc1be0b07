"""Labels of the tensors in an autograd graph, and the context that op rules get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmgfp.tracing.attention import AttentionOwner
from mmgfp.tracing.labels import NO_LABEL, LabelTable, varying
from mmgfp.tracing.splits import Splits

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """Labels of one tensor.

    Attributes:
        shape: The tensor's shape.
        planes: Independent label tensors. Each has the tensor's number of
            dimensions and is of size 1 along those that its labels do not depend
            on, so that ``(1, C, 1, 1)`` labels the channels of ``(N, C, H, W)``.
            An activation has one plane or none, a conv weight two.
        from_parameters: The tensor is computed from parameters alone.

    Examples:
        >>> import torch
        >>> channels = torch.arange(4).reshape(1, 4, 1, 1)
        >>> value = Value((2, 4, 8, 8), (channels,))
        >>> [sorted(varying(plane)) for plane in value.planes]
        [[1]]
    """

    shape: Shape
    planes: tuple[Tensor, ...] = ()
    from_parameters: bool = False


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, as the graph shows it.

    Attributes:
        weight: Name of the weight parameter.
        inputs: Labels of the input channels, shape (C_in,), `NO_LABEL` where an
            input channel comes from no layer.
        transposed: The layer is a transposed convolution.
        groups: Number of conv groups.
    """

    weight: str
    inputs: Tensor
    transposed: bool = False
    groups: int = 1


@dataclass
class Context:
    """Node and tracing state that an op rule may use beside its operands.

    Attributes:
        table: Where labels are equated and frozen.
        node: The autograd node; its ``_saved_*`` attributes hold the geometry.
        out_shapes: Shapes of the op's outputs.
        buffers: Buffer names by data pointer.
        calls: Layer calls so far; layer rules append to it.
        narrowed: Weights of group convs whose conv groups all stay and get narrower.
        attention_owners: The attention modules of parameters, by the parameters' names.
        splits: How to read code that splits channels into several dimensions.
    """

    table: LabelTable
    node: Any
    out_shapes: list[Shape]
    buffers: dict[int, str]
    calls: list[LayerCall] = field(default_factory=list)
    narrowed: frozenset[str] = frozenset()
    attention_owners: Mapping[str, AttentionOwner] = field(default_factory=dict)
    splits: Splits = field(default_factory=Splits)

    @property
    def op(self) -> str:
        """The op's name without autograd's ending, such as ``Convolution``."""
        return op_name(self.node)

    @property
    def shape(self) -> Shape:
        """Shape of the first output."""
        return self.out_shapes[0]

    def saved(self, name: str) -> Any:
        """Return the attribute ``_saved_<name>``; negative integers read as such."""
        value = getattr(self.node, f'_saved_{name}')
        if isinstance(value, tuple):
            return tuple(signed(v) for v in value)
        return signed(value)

    def signed_dims(self, dims: Iterable[int], rank: int) -> tuple[int, ...]:
        """Count dimensions of a tensor of ``rank`` dimensions from the front."""
        return tuple(signed(d) % rank for d in dims)

    def value(
        self, planes: Sequence[Tensor], like: Value, shape: Shape | None = None
    ) -> Value:
        """Return a result of this op; freeze planes that shrank to a single label."""
        passed = []
        for plane in planes:
            # A single label looks like a dimension that labels do not depend on.
            if varying(plane):
                passed.append(plane)
            else:
                self.freeze(plane, 'a single channel is picked out by')
        shape = self.shape if shape is None else shape
        return Value(shape, tuple(passed), like.from_parameters)

    def known(self, value: Value | None) -> Value:
        """Return ``value``; one without labels for an operand outside of the graph."""
        return value if value is not None else Value(self.shape)

    def merge(self, plane: Tensor, dim: int) -> Tensor:
        """Equate all elements along ``dim``; return one slice of size 1 there.

        An element without a label stays, so what is equated with it is frozen.
        """
        merged = self.table.merge(plane, dim)
        fixed = (plane == NO_LABEL).any(dim, keepdim=True) & (merged != NO_LABEL)
        self.freeze(merged[fixed], 'tied to channels of fixed width by')
        return merged

    def freeze(self, labels: Tensor, what: str) -> None:
        """Freeze ``labels``; the reason says ``what`` happens to them, and the op."""
        self.table.freeze(labels, f'{what} {self.op}')

    def freeze_value(self, value: Value | None, what: str) -> None:
        """Freeze all labels of ``value``."""
        for plane in planes_of(value):
            self.freeze(plane, what)

    def unmixed(
        self, planes: Iterable[Tensor], dims: Iterable[int], what: str
    ) -> list[Tensor]:
        """Return the planes that do not vary along any of ``dims``; freeze the others.

        Args:
            planes: Labels of an operand.
            dims: Dimensions along which the op mixes elements.
            what: What happens to frozen channels, as for `freeze`.
        """
        mixed_dims, unmixed = frozenset(dims), []
        for plane in planes:
            if varying(plane) & mixed_dims:
                self.freeze(plane, what)
            else:
                unmixed.append(plane)
        return unmixed

    def is_constant(self, value: Value | None) -> bool:
        """Return whether ``value`` is computed from buffers alone."""
        if value is None or not (value.from_parameters and value.planes):
            return False
        names = {name for p in value.planes for name in self.table.owners(p)}
        return names <= set(self.buffers.values())

    def attention_owner(self, plane: Tensor) -> AttentionOwner | None:
        """Return the attention module whose layers made all channels of ``plane``."""
        names = self.table.owners(plane)
        owners = {self.attention_owners.get(name) for name in names}
        return owners.pop() if len(owners) == 1 else None


def planes_of(value: Value | None) -> tuple[Tensor, ...]:
    """Return the planes of an operand; none if it needs no gradient."""
    return value.planes if value else ()


def signed(number: Any) -> Any:
    """Return a saved integer; autograd shows negative ones as unsigned."""
    if isinstance(number, int) and number >= 1 << 63:
        return number - (1 << 64)
    return number


def op_name(node: Any) -> str:
    """Return the name of a node's op: ``Addmm`` for ``AddmmBackward0`` and its like."""
    name = node.name().rsplit('::', 1)[-1].rstrip('>0123456789')
    return name.removesuffix('Backward')


def reshape_plane(plane: Tensor, source: Shape, target: Shape) -> Tensor:
    """Return the labels of ``x.view(target)``, where ``x`` is of shape ``source``.

    Only runs of dimensions that are really joined or split, and carry labels, are
    written out; all others stay of size 1, which saves the memory of whole images.
    """
    expanded: list[int] = []
    result: list[int] = []
    for ins, outs in blocks(source, target):
        if all(plane.shape[d] == 1 for d in ins):
            expanded += [1] * len(ins)
            result += [1] * len(outs)
        else:
            expanded += [source[d] for d in ins]
            result += [target[d] for d in outs]
    return plane.expand(expanded).reshape(result)


def blocks(source: Shape, target: Shape) -> list[tuple[range, range]]:
    """Return the smallest runs of dimensions of equal product in both shapes.

    Examples:
        >>> blocks((2, 4, 5), (2, 20))
        [(range(0, 1), range(0, 1)), (range(1, 3), range(1, 2))]
    """
    runs = []
    i = j = 0
    while i < len(source) or j < len(target):
        # Take a dimension of each, then more on the side of the smaller product.
        i0, j0 = i, j
        i, j = min(i + 1, len(source)), min(j + 1, len(target))
        while (a := math.prod(source[i0:i])) != (b := math.prod(target[j0:j])):
            if a < b and i < len(source):
                i += 1
            elif j < len(target):
                j += 1
            else:  # a zero-sized dimension leaves no other factorisation
                i, j = len(source), len(target)
                break
        runs.append((range(i0, i), range(j0, j)))
    return runs


def fill_unlabelled(plane: Tensor, other: Tensor) -> Tensor:
    """Return ``plane`` with its unlabelled elements taken from ``other``."""
    if not (plane == NO_LABEL).any():
        return plane
    return other.where(plane == NO_LABEL, plane)
