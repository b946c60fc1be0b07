"""Files that are written whole or not at all, and read without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmgfp.utils.errors import SavingError, StructureError


class _StandIn(list):
    """Placeholder for an object of a class that a checkpoint may not name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore the content of the object."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the content of the object."""


class _Harmless:
    """A pickle module that loads tensors and plain containers and nothing else."""

    # The one in Python, because the one in C sets states without asking.
    class Unpickler(pickle._Unpickler):
        """Resolve the names that weights need; all others become stand-ins."""

        dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)
        stack: list[Any]

        def find_class(self, module: str, name: str) -> Any:
            known = (module, name) in _WEIGHT_NAMES
            return super().find_class(module, name) if known else _StandIn

        def load_build(self) -> None:
            """Set the state of an object: only of what weights give one.

            Raises:
                UnpicklingError: If it is the state of anything else. A file could
                    set attributes of classes, and so change the whole process.
            """
            state = self.stack.pop()
            target = self.stack[-1]
            if type(target) is OrderedDict and isinstance(state, dict):
                metadata = state.get('_metadata')  # versions of a model's modules
                if isinstance(metadata, dict):
                    vars(target)['_metadata'] = metadata
            elif type(target) is not _StandIn:
                raise pickle.UnpicklingError(f'it sets the state of {target!r:.60}')

        dispatch[pickle.BUILD[0]] = load_build

    @classmethod
    def load(cls, file: Any, **kwargs: Any) -> Any:
        """Load as `pickle.load` does; torch calls it for files of its old format."""
        return cls.Unpickler(file, **kwargs).load()


_WEIGHT_NAMES = {
    ('collections', 'OrderedDict'),
    ('torch', 'Size'),
    ('torch', 'device'),
    ('torch._utils', '_rebuild_tensor_v2'),
    ('torch._utils', '_rebuild_parameter'),
}


def atomic_write(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it to ``path``.

    Args:
        path: The file to write; its folder is made if there is none.
        write: Writes to the path that it is given.

    Raises:
        SavingError: If the disk is full or fails, or the folder cannot be written to.
            A file that was at ``path`` before is as it was.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), 'notes.txt')
        >>> atomic_write(path, lambda tmp: tmp.write_text('whole'))
        >>> path.read_text()
        'whole'
    """
    path = Path(path)
    check_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    tmp = Path(name)
    try:
        write(tmp)
        with tmp.open('rb') as file:
            os.fsync(file.fileno())
        tmp.chmod(0o644)  # temporary files are readable by their owner only
        tmp.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        reason = getattr(error, 'strerror', None) or str(error).partition('\n')[0]
        raise SavingError(
            str(path),
            'written whole',
            reason,
            'what was there before is untouched; make room and run it again, with '
            '--resume if it is a training',
        ) from error
    finally:
        tmp.unlink(missing_ok=True)


def check_folder(path: str | Path) -> None:
    """Make a folder unless there is one, and check that files can be put into it.

    Raises:
        SavingError: If it is a file, or may not be written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SavingError(
            str(path), 'a folder to write to', str(error.strerror), 'name another one'
        ) from error


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Save with `torch.save`, whole or not at all.

    Raises:
        SavingError: If the disk is full or fails.
    """
    atomic_write(path, lambda tmp: torch.save(checkpoint, tmp))


def load_weights_only(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Training checkpoints of MMEngine hold message buffers beside the weights; such
    objects come back as empty stand-ins.

    Raises:
        StructureError: If the file is missing or damaged, or holds no dict.
    """
    try:
        try:
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=False, pickle_module=_Harmless
            )
    except Exception as error:  # torch raises many kinds, all for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StructureError(
            str(path),
            'a checkpoint that loads with weights_only=True',
            reason,
            'check the path; write the file again if it is cut short',
        ) from None
    if not isinstance(checkpoint, dict):
        raise StructureError(
            f'{path} must hold a dict (got {type(checkpoint).__name__}); '
            'give a checkpoint file'
        )
    return checkpoint
