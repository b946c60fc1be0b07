"""Times of all models of a comparison, which take turns in one process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmgfp.apps.benchmark import measure_batch, subjects_of
from mmgfp.apps.cli import write_json
from mmgfp.apps.subjects import EAGER
from mmgfp.apps.weight_files import digests_of
from mmgfp.utils.errors import MMGFPError

#: Keys of reports by runtime.
KEYS = {EAGER: 'latency_ms', 'onnxruntime': 'onnxruntime_ms'}


def measure_all(
    models: Mapping[str, str],
    shape: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    path: Path,
) -> dict[str, Any]:
    """Time models side by side in PyTorch and in onnxruntime, with one thread.

    Args:
        models: ``CONFIG:CHECKPOINT`` by name, the baseline first.
        shape: Size (C, H, W) of an image.
        batches: Numbers of images.
        rounds: Timed passes of each; 0 times nothing.
        path: A file that holds the times of these very models, if they were measured
            before; it is written.

    Returns:
        ``times``, median milliseconds by key, batch size and name: those of the
        baseline times the median ratio to them in the same round, so that what slows a
        whole round cancels out; and ``notes`` on models that could not be timed.
    """
    asked: dict[str, Any] = {'models': dict(models), 'input_shape': list(shape)}
    asked |= {'batches': list(batches), 'rounds': rounds, 'threads': 1}
    if not rounds:
        return {**asked, 'times': {}, 'notes': []}
    asked['weights'] = digests_of([s.rpartition(':')[2] for s in models.values()])
    saved = json.loads(path.read_text()) if path.is_file() else {}
    if all(saved.get(key) == value for key, value in asked.items()):
        return saved
    torch.set_num_threads(1)
    rows, notes = [], []
    for batch in batches:
        measured, lines = _measure_batch([*models.values()], (batch, *shape), rounds)
        rows += measured
        notes += lines
    names = {source: name for name, source in models.items()}
    times: dict[str, dict[str, dict[str, float]]] = {}
    base: dict[tuple[str, int], float] = {}
    for row in rows:  # the first one of each runtime and batch is what ratios are to
        value = base.setdefault(
            (row['runtime'], row['batch']), row['wall_ms']['median']
        )
        by_batch = times.setdefault(KEYS[row['runtime']], {})
        by_name = by_batch.setdefault(str(row['batch']), {})
        by_name[names[row['model']]] = value * row['wall_ratio']['median']
    report = {**asked, 'times': times, 'notes': notes, 'rows': rows}
    write_json(path, report)
    return report


def _measure_batch(
    sources: Sequence[str], size: Sequence[int], rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time models on batches of one size, (N, C, H, W).

    Returns:
        The rows of `measure_batch`, and a line for each that could not be timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            prepared = subjects_of(sources, [*KEYS], size, 'raw', 1, Path(folder))
            rows, notes = measure_batch(prepared[0], rounds, memory=False)
        except (MMGFPError, RuntimeError, ValueError, TypeError) as error:
            words = ' '.join(str(error).split())[:200]
            return [], [f'no times of batches of {size[0]}: {words}']
    return rows, prepared[1] + notes
