"""Attention modules, and the attributes with which they count their heads.

A head is a unit only if its module can be told how many heads remain. An
`AttentionSpec` says how. Modules are known by their attributes, not by their class, so
that subclasses and copies of a class in another library need no spec of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class AttentionSpec:
    """Description of an attention module whose code copes with fewer heads.

    The code must take every width of all heads together from ``head_counts`` or from
    its tensors, and keep the width of one head.

    Attributes:
        attributes: Children and sizes by which such a module is known, ``proj`` among
            them, the layer that reads all heads.
        head_width: Attribute that holds how many channels ``proj`` reads from one head.
        head_counts: Integer attributes that are multiples of the number of heads;
            ``num_heads`` is the first.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_heads, self.size = 4, 2
        ...         self.to_qkv, self.proj = nn.Linear(3, 24), nn.Linear(8, 5)
        >>> spec = AttentionSpec(('to_qkv', 'proj'), 'size', ('num_heads',))
        >>> ATTENTION_SPECS.append(spec)
        >>> attention_spec(Attention()) is ATTENTION_SPECS.pop()
        True
    """

    attributes: tuple[str, ...]
    head_width: str
    head_counts: tuple[str, ...]


#: Append a spec of your own before tracing.
ATTENTION_SPECS = [
    # mmpretrain: ViT, DeiT, T2T, RevViT, EVA02, EdgeNeXt, DaViT's channel attention.
    AttentionSpec(('qkv', 'proj'), 'head_dims', ('num_heads', 'embed_dims')),
    # mmpretrain: LeViT, TinyViT, EfficientFormer.
    AttentionSpec(
        ('proj', 'key_dim', 'attention_biases'), 'd', ('num_heads', 'dh', 'nh_kd')
    ),
]


@dataclass(frozen=True)
class AttentionOwner:
    """The attention module that a parameter belongs to.

    Attributes:
        class_name: Name of its class.
        num_heads: Its number of heads.
        spec: How it counts them; None where `ATTENTION_SPECS` has none for it.
    """

    class_name: str
    num_heads: int
    spec: AttentionSpec | None


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """Return the spec that fits an attention module; None for all other modules."""
    for spec in ATTENTION_SPECS:
        sizes = [getattr(module, n, None) for n in (spec.head_width, *spec.head_counts)]
        has_sizes = all(type(size) is int for size in sizes)
        if has_sizes and all(hasattr(module, name) for name in spec.attributes):
            return spec
    return None


def attention_owners(model: nn.Module) -> dict[str, AttentionOwner]:
    """Return the attention module of each parameter in one, by the parameter's name."""
    owners = {}
    for name, module in model.named_modules():
        num_heads, spec = getattr(module, 'num_heads', None), attention_spec(module)
        if type(num_heads) is not int:
            continue
        owner = AttentionOwner(type(module).__name__, num_heads, spec)
        for parameter, _ in module.named_parameters(prefix=name):
            # A module without a spec may hold a whole network, most of which has
            # nothing to do with its heads. Only its direct children count.
            depth = parameter.count('.') - name.count('.') - bool(name)
            if spec or depth <= 1:
                owners[parameter] = owner
    return owners


def update_head_counts(module: nn.Module, spec: AttentionSpec) -> None:
    """Make the counts of an attention module true after its layers were cut."""
    width = getattr(module, spec.head_width)
    num_heads = _input_width(module.get_submodule('proj')) // width
    before = getattr(module, spec.head_counts[0])
    for name in spec.head_counts:
        setattr(module, name, getattr(module, name) // before * num_heads)


def _input_width(proj: nn.Module) -> int:
    """Return how many channels the first fully connected layer in ``proj`` reads."""
    return next(m.weight.shape[1] for m in proj.modules() if isinstance(m, nn.Linear))
