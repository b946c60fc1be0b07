"""What the tracer knows of a tensor in the autograd graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmgfp.tracing.attention import AttentionOwner
from mmgfp.tracing.labels import NO_LABEL, LabelTable, varying

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
    """What an op rule may use beside its operands.

    Attributes:
        table: Where labels are equated and frozen.
        node: The autograd node; its ``_saved_*`` attributes hold the geometry.
        out_shapes: Shapes of the op's outputs.
        buffers: Buffer names by data pointer.
        calls: Layer calls found so far; layer rules append to it.
        narrowed: Weights of group convs whose conv groups all stay and narrow.
        heads: The attention modules of parameters, by the parameters' names.
    """

    table: LabelTable
    node: Any
    out_shapes: list[Shape]
    buffers: dict[int, str]
    calls: list[LayerCall] = field(default_factory=list)
    narrowed: frozenset[str] = frozenset()
    heads: Mapping[str, AttentionOwner] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The op's name without autograd's ending, such as ``Convolution``."""
        return op_name(self.node)

    @property
    def shape(self) -> Shape:
        """Shape of the first output."""
        return self.out_shapes[0]

    def saved(self, name: str) -> Any:
        """The attribute ``_saved_<name>``; negative integers read as such."""
        value = getattr(self.node, f'_saved_{name}')
        if isinstance(value, tuple):
            return tuple(signed(v) for v in value)
        return signed(value)

    def signed_dims(self, dims: Iterable[int], rank: int) -> tuple[int, ...]:
        """Dimensions of a tensor of ``rank`` dimensions, counted from the front."""
        return tuple(signed(d) % rank for d in dims)

    def value(
        self, planes: Sequence[Tensor], like: Value, shape: Shape | None = None
    ) -> Value:
        """A result of this op. A plane that shrank to one label freezes it."""
        kept = []
        for plane in planes:
            if varying(plane):
                kept.append(plane)
            else:
                self.freeze(plane, 'a single channel is picked out by')
        shape = self.shape if shape is None else shape
        return Value(shape, tuple(kept), like.from_parameters)

    def known(self, value: Value | None) -> Value:
        """The operand of a shape op; one that is not in the graph has no labels."""
        return value if value is not None else Value(self.shape)

    def merge(self, plane: Tensor, dim: int) -> Tensor:
        """Equate all elements along ``dim``; return one slice of size 1 there.

        What stands beside an element without a label stays, as that one does.
        """
        merged = self.table.merge(plane, dim)
        fixed = (plane == NO_LABEL).any(dim, keepdim=True) & (merged != NO_LABEL)
        self.freeze(merged[fixed], 'tied to channels of fixed width by')
        return merged

    def freeze(self, labels: Tensor, what: str) -> None:
        """Freeze ``labels``; the reason names ``what`` happens and the op."""
        self.table.freeze(labels, f'{what} {self.op}')

    def freeze_value(self, value: Value | None, what: str) -> None:
        """Freeze all labels of ``value``."""
        for plane in value.planes if value else ():
            self.freeze(plane, what)

    def attention(self, plane: Tensor) -> AttentionOwner | None:
        """The attention module whose layers made all the channels of ``plane``."""
        owners = {self.heads.get(name) for name in self.table.owners(plane)}
        return owners.pop() if len(owners) == 1 else None

    def mixed(self, plane: Tensor, dims: frozenset[int], what: str) -> bool:
        """Freeze ``plane`` and say so if its labels depend on one of ``dims``."""
        if varying(plane) & dims:
            self.freeze(plane, what)
            return True
        return False


def signed(number: Any) -> Any:
    """Undo the wrap-around with which autograd shows negative dimensions."""
    if isinstance(number, int) and number >= 1 << 63:
        return number - (1 << 64)
    return number


def op_name(node: Any) -> str:
    """Name of an autograd node's op: ``AddmmBackward0`` and its like give ``Addmm``."""
    name = node.name().rsplit('::', 1)[-1].rstrip('>0123456789')
    return name.removesuffix('Backward')


def reshape_plane(plane: Tensor, source: Shape, target: Shape) -> Tensor:
    """Labels of ``x.view(target)`` from those of ``x`` of shape ``source``.

    Only runs of dimensions that are really joined or split, and carry labels, are
    written out.
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
    """Smallest runs of dimensions of equal product in both shapes."""
    runs = []
    i = j = 0
    while i < len(source) or j < len(target):
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
    """``plane`` with its unlabelled elements taken from ``other``."""
    if not (plane == NO_LABEL).any():
        return plane
    return other.where(plane == NO_LABEL, plane)
