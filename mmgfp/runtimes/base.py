"""Opening of a model file in the runtime that ships it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np

from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import Registry


class Session(ABC):
    """A model file, opened in a runtime and ready to run on the CPU.

    Args:
        path: The file.
        threads: Threads that one run may use; the runtime's default if None.

    Attributes:
        suffixes: File names that this runtime opens end like this.
        package: The package that has to be installed.
        inputs: Sizes of the inputs by name; None where a size is free.
        outputs: Names of the outputs, in order.
        metadata: Texts stored in the file, by key.
    """

    suffixes: ClassVar[tuple[str, ...]]
    package: ClassVar[str]

    inputs: dict[str, tuple[int | None, ...]]
    outputs: tuple[str, ...]
    metadata: dict[str, str]

    @abstractmethod
    def __init__(self, path: str | Path, threads: int | None = None) -> None: ...

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, in order.

        Args:
            inputs: Arrays by the names of the inputs.
        """


#: Runtimes by name; one file in this package each.
RUNTIMES: Registry[Session] = Registry('runtime', 'mmgfp.runtimes')


def open_model(
    path: str | Path, runtime: str | None = None, threads: int | None = None
) -> Session:
    """Open a model file.

    Args:
        path: The file.
        runtime: A name in `RUNTIMES`; by default the first one that opens files of
            this suffix.
        threads: Threads that one run may use; the runtime's default if None.

    Raises:
        ConfigError: If the file is missing, no runtime opens it, or the runtime is not
            installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError('model', 'a file', str(path), 'check the path')
    suffixes = [s for n in RUNTIMES.names() for s in RUNTIMES[n].suffixes]
    if path.suffix not in suffixes:
        raise ConfigError(
            f'model {path}',
            f'an exported file ({", ".join(dict.fromkeys(suffixes))})',
            f'one that ends in {path.suffix!r}',
            'write such a file with tools/export.py; a checkpoint (.pth) is not opened '
            'in a runtime, so tools/test.py takes it without --runtime',
        )
    names = [n for n in RUNTIMES.names() if path.suffix in RUNTIMES[n].suffixes]
    runtime = names[0] if runtime is None else runtime
    if RUNTIMES.canonical(runtime) not in names:
        raise ConfigError(
            'runtime',
            f'one that opens {path.suffix} files: {", ".join(names)}',
            repr(runtime),
            'name another runtime or export the model for this one',
        )
    return RUNTIMES[runtime](path, threads)


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: Its import name.
        extra: The extra of mmgfp that installs it.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f'the package {package}',
            'installed',
            str(error),
            f"install it, as with pip install 'mmgfp[{extra}]'",
        ) from error
