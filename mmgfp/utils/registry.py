"""Registries of named, interchangeable parts: criteria, costs, schedules."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from mmgfp.utils.errors import ConfigError

T = TypeVar('T')


class Registry(Generic[T]):
    """Classes by the name under which a configuration asks for them.

    Registration needs no MMEngine, so that plain PyTorch users have the same names.

    Args:
        kind: Singular name of the things registered, for messages.
        package: A package whose modules register the built-in entries; they are
            imported when the registry is first looked into, so that a new file in
            that package is all it takes.

    Examples:
        >>> SHAPES: Registry = Registry('shape')
        >>> @SHAPES.register('square')
        ... class Square:
        ...     def __init__(self, side=1):
        ...         self.side = side
        >>> SHAPES.build(dict(type='square', side=3)).side
        3
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._is_of_package = package is not None
        self._entries: dict[str, type[T]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[type[T]], type[T]]:
        """Register a class under a name, and under further ones that mean the same.

        Raises:
            KeyError: If one of the names is taken.
        """

        def decorate(entry: type[T]) -> type[T]:
            for key in (name, *aliases):
                if key in self._aliases:
                    holder = self._entries[self._aliases[key]].__name__
                    raise KeyError(f'{self.kind} {key!r} is {holder} already')
            self._entries[name] = entry
            self._aliases |= dict.fromkeys((name, *aliases), name)
            return entry

        return decorate

    def remove(self, name: str) -> None:
        """Forget a class and all its names."""
        del self._entries[name]
        self._aliases = {a: n for a, n in self._aliases.items() if n != name}

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and name in self._aliases

    def __getitem__(self, name: str) -> type[T]:
        return self._entries[self.canonical(name)]

    def names(self) -> list[str]:
        """Return the first name of every entry, in order of registration.

        Those of a package come in the order of its modules, whichever was imported
        first.
        """
        self._load()
        if self._is_of_package:
            return sorted(self._entries, key=lambda n: self._entries[n].__module__)
        return list(self._entries)

    def canonical(self, name: str) -> str:
        """Return the first name of the entry that ``name`` stands for.

        Raises:
            ConfigError: If nothing is registered under ``name``.
        """
        self._load()
        if name not in self._aliases:
            raise ConfigError(
                self.kind,
                f'one of {", ".join(self._aliases)}',
                repr(name),
                nearest_hint(name, self._aliases)
                or 'register it in a module that custom_imports names',
            )
        return self._aliases[name]

    def build(self, spec: str | Mapping[str, Any]) -> T:
        """Build an entry from its name or from ``dict(type=name, **arguments)``.

        Raises:
            ConfigError: If there is no such entry, or it has no such argument.
        """
        arguments = dict(spec) if isinstance(spec, Mapping) else {'type': spec}
        name = arguments.pop('type', None)
        if not isinstance(name, str):
            raise ConfigError(
                self.kind, 'a name or dict(type=name, ...)', repr(spec), 'name one'
            )
        entry = self[name]
        parameters = inspect.signature(entry).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            check_known(f'{self.kind} {name}', arguments, [p.name for p in parameters])
        packed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [p for p in parameters if p.kind not in packed]
        required = [p.name for p in named if p.default is p.empty]
        missing = [name for name in required if name not in arguments]
        if missing:
            raise ConfigError(
                f'{self.kind} {name} needs {", ".join(missing)} (got {spec!r}); '
                f'give dict(type={name!r}, {missing[0]}=...)'
            )
        return entry(**arguments)

    def _load(self) -> None:
        package, self._package = self._package, None
        if package is not None:
            for module in pkgutil.iter_modules(import_module(package).__path__):
                import_module(f'{package}.{module.name}')


def check_known(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not among those ``known``, and suggest the nearest one.

    Args:
        owner: The thing that is given arguments of these names.
        names: The names.
        known: Names that it knows.

    Raises:
        ConfigError: If a name is unknown.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(
                f'{owner}.{name}',
                f'one of its options: {", ".join(known) or "none"}',
                repr(name),
                nearest_hint(name, known) or 'remove it',
            )


def nearest_hint(name: Any, known: Iterable[str]) -> str:
    """Return a question that offers the known name nearest to ``name``, if any is."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f'did you mean {near[0]!r}?' if near else ''
