"""Hooks that belong to one module, and do not work in its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ModuleHook:
    """A hook of one module; a copy of it, as in a copied or saved model, does nothing.

    Args:
        module: The module.
        function: Called with what the hook is called with, but for the module.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self._module, self._function = module, function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Do what is to be done at a call of the module."""
        if module is self._module and self._function is not None:
            return self._function(*args)
        return None

    def __reduce__(self) -> tuple[type[ModuleHook], tuple[()]]:
        return ModuleHook, ()
