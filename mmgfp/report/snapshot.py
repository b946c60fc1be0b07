"""What the file of a pruned model says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgfp.groups import FrozenLayer
from mmgfp.report.quantities import Quantity, quantities_of
from mmgfp.selection.narrow import NarrowGroups
from mmgfp.surgery.structure import STRUCTURE_KEY, PruneStructure
from mmgfp.utils.errors import StructureError
from mmgfp.utils.io import load_weights_only


@dataclass(frozen=True)
class Cost:
    """A cost of a pruned model.

    Attributes:
        quantity: Which one.
        remaining: Its value.
        ratio: Its share of the unpruned model's.
    """

    quantity: Quantity
    remaining: float
    ratio: float

    @property
    def before(self) -> float:
        """The value of the unpruned model."""
        return self.remaining / self.ratio if self.ratio else 0.0

    @property
    def text(self) -> str:
        """The value as tables show it."""
        return self.quantity.text(self.remaining)


@dataclass(frozen=True)
class GroupFacts:
    """A group of coupled channels, and what is left of it.

    Attributes:
        name: The layer that makes the channels.
        units: Units before pruning.
        remaining: Units that stay.
        members: Tensor, dimension and role of each member, see `mmgfp.groups.Member`.
        importance: The lowest, the median and the highest importance of the units that
            stay, at the last decision; None if it is not known.
    """

    name: str
    units: int
    remaining: int
    members: tuple[tuple[str, int, str], ...]
    importance: tuple[float, float, float] | None

    def modules(self, *roles: str) -> list[str]:
        """Return the modules that take part in one of the roles, each once."""
        names = (n.rpartition('.')[0] for n, _, role in self.members if role in roles)
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Snapshot:
    """A pruned model, as its file describes it.

    Attributes:
        path: The file.
        label: Its name for people, such as ``flops50``.
        iteration: The iteration in which it was saved; None if it is not known.
        input_shape: Size (C, H, W) of the image that costs are counted for, if known.
        costs: Its costs; none if the file does not name them.
        widths: Channels left and before, by layer, in the model's order.
        criterion: What importance is measured by; empty if it is not known.
        groups: All groups; None if the file does not name them.
        frozen: Layers that keep channels; None if the file does not name them.
        gone: Modules that are gone whole.
        narrow: Groups that the divisor keeps whole; None if the file does not name
            them.
    """

    path: Path
    label: str
    iteration: int | None
    input_shape: tuple[int, ...] | None
    costs: tuple[Cost, ...]
    widths: dict[str, tuple[int, int]]
    criterion: str
    groups: tuple[GroupFacts, ...] | None
    frozen: tuple[FrozenLayer, ...] | None
    gone: tuple[str, ...] = ()
    narrow: NarrowGroups | None = None


def read_snapshot(path: Path, label: str) -> Snapshot | None:
    """Read the file of a pruned model; return None if it is of another model.

    Args:
        path: A checkpoint.
        label: Its name for people.

    Raises:
        StructureError: If the file is damaged.
    """
    checkpoint = load_weights_only(path)
    if STRUCTURE_KEY not in checkpoint:
        return None
    structure = PruneStructure.from_dict(checkpoint[STRUCTURE_KEY], str(path))
    try:
        meta = checkpoint.get('meta') or {}
        shapes = meta.get('shapes') or {  # of the original, as far as layers are left
            name: structure.sizes.get(name, list(tensor.shape))
            for name, tensor in checkpoint['state_dict'].items()
        }
        widths = layer_widths(structure, shapes, meta.get('out_dims'))
        costs, shape = meta.get('costs', {}), meta.get('input_shape')
        groups, frozen = meta.get('groups'), meta.get('frozen')
        narrow = meta.get('narrow')
        members = {g['name']: [m[0] for m in g['members']] for g in groups or ()}
        return Snapshot(
            path,
            label,
            # That of fine-tuning says nothing about the run that pruned.
            int(meta['iter']) if costs and 'iter' in meta else None,
            None if shape is None else tuple(shape),
            _costs(costs, meta),
            widths,
            str(meta.get('criterion', '')),
            None if groups is None else tuple(_group(g, structure) for g in groups),
            None if frozen is None else tuple(FrozenLayer(**layer) for layer in frozen),
            structure.identities,
            None if narrow is None else _narrow(narrow).left_in(structure, members),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StructureError(
            str(path),
            'a checkpoint that a pruning run saved',
            f'{type(error).__name__}: {error}',
            'write it again, or move it away',
        ) from error


def _costs(raw: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[Cost, ...]:
    remaining = {name: values['remaining'] for name, values in raw.items()}
    runtime = {'latency_profile': meta.get('latency_profile')}
    return tuple(
        Cost(quantity, value, float(raw[quantity.key]['ratio']))
        for quantity, value in quantities_of({**remaining, **runtime}).items()
    )


def _group(raw: Mapping[str, Any], structure: PruneStructure) -> GroupFacts:
    importance = raw['importance']
    if importance is not None:
        low, middle, high = map(float, importance)
        importance = (low, middle, high)
    # With a branch that nothing reads, a group goes that no decision has pruned.
    is_gone = all(structure.is_gone(name) for name, *_ in raw['members'])
    return GroupFacts(
        str(raw['name']),
        int(raw['units']),
        0 if is_gone else int(raw['remaining']),
        tuple((str(n), int(dim), str(role)) for n, dim, role in raw['members']),
        importance,
    )


def _narrow(raw: Mapping[str, Any]) -> NarrowGroups:
    return NarrowGroups(int(raw['divisor']), tuple(map(str, raw['names'])))


def layer_widths(
    structure: PruneStructure,
    shapes: Mapping[str, Sequence[int]],
    out_dims: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Count the output channels that each layer kept.

    Args:
        structure: The structure of the compact model.
        shapes: Original shapes by parameter name, in the order to list them.
        out_dims: The dimension of output channels by parameter name, where it is not 0.

    Returns:
        Kept and original output channels by layer name, for each layer with a
        weight of two or more dimensions, pruned or not; none are kept in modules that
        are gone whole.

    Examples:
        >>> structure = PruneStructure(
        ...     sizes={'conv.weight': [4, 3, 3, 3]}, kept={'conv.weight': {0: [0, 2]}}
        ... )
        >>> layer_widths(structure, {'conv.weight': [4, 3, 3, 3], 'conv.bias': [4]})
        {'conv': (2, 4)}
    """
    widths = {}
    for name, shape in shapes.items():
        if len(shape) >= 2 and name.endswith('.weight'):
            dim = (out_dims or {}).get(name, 0)
            kept = structure.kept.get(name, {}).get(dim)
            count = shape[dim] if kept is None else len(kept)
            count = 0 if structure.is_gone(name) else count
            widths[name.removesuffix('.weight')] = (count, shape[dim])
    return widths
