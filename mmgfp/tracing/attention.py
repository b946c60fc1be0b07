"""Attention modules, and the attributes with which they count their heads.

A head is a unit only if its module can be told how many are left. What it takes for
that is a `AttentionSpec`; modules are known by their attributes, not by their class, so
that subclasses and copies of a class in another library need nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class AttentionSpec:
    """A kind of attention module whose code copes with fewer heads.

    Its code must take every width of all heads from ``counts`` or leave it to the
    tensors, and keep the width of one head.

    Attributes:
        parts: Children and sizes that a module of this kind has, ``proj`` among them,
            the layer that reads all heads.
        width: Attribute that holds how many channels ``proj`` reads from one head.
        counts: Integer attributes that are multiples of the number of heads;
            ``num_heads`` is the first.
    """

    parts: tuple[str, ...]
    width: str
    counts: tuple[str, ...]


#: Append a kind of your own before tracing.
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
        module: Name of its class.
        heads: Its number of heads.
        kind: How it counts them; None if mmgfp does not know.
    """

    module: str
    heads: int
    kind: AttentionSpec | None


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """The kind of attention module that this is, if any."""
    for kind in ATTENTION_SPECS:
        numbers = [getattr(module, n, None) for n in (kind.width, *kind.counts)]
        whole = all(type(n) is int for n in numbers)
        if whole and all(hasattr(module, p) for p in kind.parts):
            return kind
    return None


def attention_owners(model: nn.Module) -> dict[str, AttentionOwner]:
    """The attention module of each parameter in one, by the parameter's name."""
    owners = {}
    for name, module in model.named_modules():
        heads, kind = getattr(module, 'num_heads', None), attention_spec(module)
        if type(heads) is not int:
            continue
        for parameter, _ in module.named_parameters(prefix=name):
            # What lies deeper in a module that nothing is known of may be a whole
            # network, most of which has nothing to do with its heads.
            depth = parameter.count('.') - name.count('.') - bool(name)
            if kind or depth <= 1:
                owners[parameter] = AttentionOwner(type(module).__name__, heads, kind)
    return owners


def update_head_counts(module: nn.Module, kind: AttentionSpec) -> None:
    """Make the counts of an attention module true after its layers were cut."""
    heads = _input_width(module.get_submodule('proj')) // getattr(module, kind.width)
    before = getattr(module, kind.counts[0])
    for name in kind.counts:
        setattr(module, name, getattr(module, name) // before * heads)


def _input_width(proj: nn.Module) -> int:
    """Channels that the first fully connected layer in ``proj`` reads."""
    return next(m.weight.shape[1] for m in proj.modules() if isinstance(m, nn.Linear))
