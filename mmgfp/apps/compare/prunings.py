"""Prunings that runs of a comparison share, each done once in its own folder."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.apps.compare.kept_configs import write_config
from mmgfp.apps.compare.variants import Run
from mmgfp.apps.pipeline import Pipeline, has_begun
from mmgfp.apps.processes import StageError
from mmgfp.apps.rounds_file import digest_of_file
from mmgfp.apps.stages import find_hook, pruned_checkpoint
from mmgfp.apps.weight_files import files_in


class SharedPrunings:
    """Prunes by a config unless that very config has pruned before.

    Args:
        folder: Gets a folder for each pruning, named after a run that asked for it.
        pipeline: Returns what runs the stages in a folder, under a label.
    """

    def __init__(self, folder: Path, pipeline: Callable[[Path, str], Pipeline]) -> None:
        self.folder = folder
        self._pipeline = pipeline
        self._choosing = threading.Lock()
        self._pruning: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._chosen: dict[Path, str] = {}

    def __call__(self, run: Run, cfg: Config) -> dict[str, Any]:
        """Return the pruned checkpoint of a run, and how it was made.

        Raises:
            StageError: If pruning fails, or misses one of the targets.
        """
        text = text_of(cfg)
        with self._pruning[text]:
            with self._choosing:
                folder = self._folder_of(run, text)
                config = write_config(text, folder / 'prune.py')
            pipeline = self._pipeline(folder, run.name)
            work_dir = pipeline.train('prune', config)
            checkpoint = pruned_checkpoint(work_dir, config)
        labels = [target.label for target in run.targets]
        missed = [n for n in labels if not (work_dir / f'prune_{n}.pth').is_file()]
        if missed:
            raise StageError(
                f'{work_dir} must hold a checkpoint of the reached target {missed[0]} '
                f'(got {Path(checkpoint).name} as the last one); raise max_iters or '
                f'units_per_step, and delete {folder}'
            )
        seconds, commits = pipeline.seconds()['prune'], pipeline.commits()
        return {'pruned': checkpoint, 'prune_seconds': seconds, 'commits': commits}

    def _folder_of(self, run: Run, text: str) -> Path:
        """Return where a config has pruned, or a folder that nothing has begun in."""
        name, *below = run.folder.parts
        for path in sorted(self.folder.glob('/'.join(['*', *below, 'prune.py']))):
            if path.read_text() == text and has_begun(path.parent, 'prune'):
                return path.parent
        names = chain([name], (f'{name}_{number}' for number in count(2)))
        folders = (self.folder.joinpath(name, *below) for name in names)
        free = (folder for folder in folders if not has_begun(folder, 'prune'))
        return next(f for f in free if self._chosen.setdefault(f, text) == text)


def text_of(cfg: Config) -> str:
    """Return the text of a config that prunes, with digests of files of its hook.

    Such are latency profiles and ratios, which are read like settings.
    """
    found = files_in(dict(find_hook(cfg)[1]), suffixes=('.json',))
    notes = (f'# {key}: {digest_of_file(path)}\n' for key, path in found)
    return cfg.pretty_text + ''.join(notes)
