"""Modules of a model by the parameters that they use."""

from __future__ import annotations

from torch import nn


def weight_owners(model: nn.Module, aliases: bool = False) -> dict[str, list[str]]:
    """Return the names of the modules that use each weight, by the weight's first name.

    Args:
        model: The module to search.
        aliases: Whether a module that has several names is listed under all of them,
            or under the first alone.

    Examples:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> second.weight = first.weight
        >>> weight_owners(nn.Sequential(first, second))
        {'0.weight': ['0', '1']}
        >>> weight_owners(nn.Sequential(first, first), aliases=True)
        {'0.weight': ['0', '1']}
    """
    names = {id(p): n for n, p in model.named_parameters()}
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=not aliases):
        weight = names.get(id(getattr(module, 'weight', None)))
        if weight is not None:
            owners.setdefault(weight, []).append(name)
    return owners
