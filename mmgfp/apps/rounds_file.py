"""The file that lets a pruning without training go on after its last round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import load_weights_only, save_checkpoint
from mmgfp.utils.plain import plain, same, short


class RoundsFile:
    """Keeps the state after a round, with the settings that it belongs to.

    Args:
        folder: The work directory.
        settings: All that the result depends on, by names that users know.

    Attributes:
        path: The file, which is there only while a run is unfinished.
        state: The state after the last round; None if there is none.
        seconds: How long pruning has taken up to then.
        rounds: How many rounds there were.

    Raises:
        ConfigError: If the file is of other settings.
        StructureError: If it is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / 'rounds.pth'
        self._settings = plain(dict(settings))
        self.state: Mapping[str, Any] | None = None
        self.seconds, self.rounds = 0.0, 0
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        saved = load_weights_only(self.path)
        settings = saved.get('settings')
        settings = settings if isinstance(settings, dict) else {}
        others = [
            f'{name}={short(settings.get(name))} instead of {short(value)}'
            for name, value in self._settings.items()
            if not same(settings.get(name), value)
        ]
        if others:
            raise ConfigError(
                '--work-dir',
                'new, or of an unfinished run with these settings',
                f'{self.path.parent}, whose {self.path.name} is of {", ".join(others)}',
                'run the command that began it, delete that file to begin anew, or '
                'name another folder',
            )
        self.state, self.seconds = saved.get('state'), saved.get('seconds', 0.0)
        self.rounds = len((self.state or {}).get('rounds', ()))

    def write(self, state: Mapping[str, Any], seconds: float) -> None:
        """Write the state after a round, whole or not at all.

        Raises:
            SavingError: If the disk is full or fails.
        """
        saved = {'settings': self._settings, 'seconds': seconds, 'state': dict(state)}
        save_checkpoint(saved, self.path)

    def remove(self) -> None:
        """Remove the file, as its run is finished."""
        self.path.unlink(missing_ok=True)


def digest_of(content: bytes) -> str:
    """Return a short digest of some content, by which it is recognised."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of_file(path: str) -> str:
    """Return a digest of a local file's content; the address of a remote one."""
    return path if '://' in path else digest_of(Path(path).read_bytes())
