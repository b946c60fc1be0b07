"""Configs of stages, written once and then compared with what would be written."""

from __future__ import annotations

from pathlib import Path

from mmgfp.apps.pipeline import has_begun
from mmgfp.apps.processes import StageError
from mmgfp.utils.io import atomic_write


def write_config(text: str, path: Path) -> str:
    """Write the whole config of a stage, or see that it is the one that was there.

    Returns:
        The path.

    Raises:
        StageError: If something was made with another one.
    """
    folder = path.parent
    stages = [path.stem, *(done.stem for done in folder.glob('done/*.json'))]
    has_result = (folder / 'result.json').is_file()
    if not has_result and not any(has_begun(folder, stage) for stage in stages):
        # What was refused, or killed before its first checkpoint, may begin otherwise.
        atomic_write(path, lambda tmp: tmp.write_text(text))
    elif not path.is_file() or path.read_text() != text:
        raise StageError(
            f'{path} must be the config that this comparison makes (got that of other '
            f'settings); delete {folder} to make it anew, or name another --work-dir'
        )
    return str(path)
