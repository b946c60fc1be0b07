"""Training checkpoints of MMEngine that are whole at any time."""

from __future__ import annotations

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmgfp.utils.io import atomic_write

#: Arguments of MMEngine by which it writes files whole or not at all.
WHOLE = {'backend': 'mmgfp_whole'}


@register_backend(WHOLE['backend'], force=True)
class WholeFileBackend(LocalBackend):
    """Files on a local disk that are written whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        atomic_write(filepath, lambda tmp: tmp.write_bytes(obj))


def write_whole(runner: Runner) -> None:
    """Let a kill while the runner saves leave a checkpoint to resume from.

    MMEngine writes files in place, and first removes the oldest.
    """
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook):
            continue
        if hook.max_keep_ckpts == 1:
            hook.max_keep_ckpts = 2
            runner.logger.info(
                'two checkpoints are kept, max_keep_ckpts=1 notwithstanding: one is '
                'whole while the other one is written'
            )
        elsewhere = hook.backend_args or hook.file_client_args
        if not elsewhere and '://' not in str(hook.out_dir or runner.work_dir):
            hook.backend_args = dict(WHOLE)


def newest_checkpoint(work_dir: str | Path) -> Path | None:
    """The checkpoint to resume from, None if none was written yet.

    It is the one that MMEngine has noted in ``last_checkpoint``. A kill while that note
    was written may have left it empty: then it is the file written last.
    """
    note = Path(work_dir) / 'last_checkpoint'
    noted = note.read_text().strip() if note.is_file() else ''
    if noted and Path(noted).is_file():
        return Path(noted)
    files = [p for n in ('iter', 'epoch') for p in note.parent.glob(f'{n}_*.pth')]
    newest = max(files, key=lambda p: p.stat().st_mtime, default=None)
    return newest or (Path(noted) if noted else None)
