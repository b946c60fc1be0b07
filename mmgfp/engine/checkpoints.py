"""Training checkpoints of MMEngine that can be resumed from at any time."""

from __future__ import annotations

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmgfp.utils.io import atomic_write

#: ``backend_args`` by which MMEngine writes a file whole or not at all.
ATOMIC_BACKEND = {'backend': 'mmgfp_atomic'}


@register_backend(ATOMIC_BACKEND['backend'], force=True)
class AtomicLocalBackend(LocalBackend):
    """Writes files on a local disk whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file.

        Raises:
            SavingError: If the disk is full or fails; the file is as it was before.
        """
        atomic_write(filepath, lambda tmp: tmp.write_bytes(obj))


def save_atomically(runner: Runner) -> None:
    """Let the runner's checkpoints survive that it is killed while it saves.

    MMEngine writes files in place, and removes the oldest one before. Checkpoints that
    go to another backend than the local disk are left to it.
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
        has_backend = hook.backend_args or hook.file_client_args
        if not has_backend and '://' not in str(hook.out_dir or runner.work_dir):
            hook.backend_args = dict(ATOMIC_BACKEND)


def checkpoint_is_due(runner: Runner) -> bool:
    """Return whether a `CheckpointHook` is about to write one of this iteration."""
    return any(
        hook.every_n_train_iters(runner, hook.interval)
        or hook.is_last_train_iter(runner)
        for hook in runner.hooks
        if isinstance(hook, CheckpointHook) and not hook.by_epoch
    )


def newest_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the checkpoint to resume from, None if none was written yet.

    It is the one that MMEngine has noted in ``last_checkpoint``. A kill while that note
    was written may have left it empty: then it is the file written last.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ('iter_10.pth', 'iter_20.pth', 'last_checkpoint'):
        ...         Path(folder, name).touch()
        ...     newest_checkpoint(folder).name
        'iter_20.pth'
    """
    note = Path(work_dir) / 'last_checkpoint'
    noted = note.read_text().strip() if note.is_file() else ''
    if noted and Path(noted).is_file():
        return Path(noted)
    files = [p for n in ('iter', 'epoch') for p in note.parent.glob(f'{n}_*.pth')]
    newest = max(files, key=lambda p: p.stat().st_mtime, default=None)
    return newest or (Path(noted) if noted else None)
