"""Comparison of the models that `tools/prune.py` produced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import load_checkpoint

from mmgfp.apps.analysis import costs_of
from mmgfp.apps.cli import build_from, load_config, write_json
from mmgfp.apps.latency import measure_runtimes
from mmgfp.apps.pipeline import Candidate, Pipeline
from mmgfp.apps.plots import plot_channels
from mmgfp.apps.run_config import data_of
from mmgfp.apps.stages import parse_options
from mmgfp.apps.tables import (
    disturbed,
    machine_facts,
    markdown,
    print_table,
    table_cells,
)
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_calls
from mmgfp.report.snapshot import layer_widths
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.io import atomic_write


def measure(
    pipeline: Pipeline,
    candidates: Sequence[Candidate],
    shape: Sequence[int],
    rounds: int,
    batches: Sequence[int],
    tested: bool = True,
) -> list[dict[str, Any]]:
    """Test candidates, count their costs for one image and time them on the CPU.

    Args:
        pipeline: Runs the tests.
        candidates: The models to compare.
        shape: Size (C, H, W) of the image.
        rounds: How often models are timed; 0 times nothing.
        batches: Batch sizes that are timed.
        tested: Whether models are tested.

    Returns:
        The rows of `mmgfp.apps.tables.table_cells`.
    """
    rows = []
    models: dict[str, torch.nn.Module] = {}
    for candidate in candidates:
        row: dict[str, Any] = {'model': candidate.name}
        if tested:
            row['metrics'] = pipeline.test(candidate, f'test_{candidate.name}')
        model, calls = build(candidate, pipeline.options)
        models[candidate.name] = model
        rows.append({**row, **costs_of(model, calls.profile(model, shape))})
    for count in batches if rounds else ():
        print(f'timing {len(models)} models in batches of {count}', flush=True)
        # The calls of any candidate do, as all of them read the same images.
        infer = calls.inference(model, shape, count)
        size = (count, *shape)
        times, reason = measure_runtimes(models, infer, size, rounds)
        if reason:
            print(reason)
        for row in rows:
            for key, by_model in times.items():
                row.setdefault(key, {})[str(count)] = by_model[row['model']]
    return rows


def build(
    candidate: Candidate, options: Sequence[str]
) -> tuple[torch.nn.Module, BatchCalls]:
    """Build a model with its weights, in eval mode, and its calls on a demo batch."""
    cfg = load_config(candidate.config, parse_options([*options, *candidate.options]))
    model = build_from(cfg)
    load_checkpoint(model, candidate.checkpoint, map_location='cpu')
    calls = demo_calls(cfg, model)
    model.eval()  # not chained: where distillation overrides it, it returns None
    return model, calls


def write_results(
    pipeline: Pipeline,
    rows: Sequence[Mapping[str, Any]],
    shape: Sequence[int],
    configs: Sequence[str],
) -> None:
    """Write results.json and results.md, and print the table.

    Args:
        pipeline: Its work directory gets the files; they tell how long its stages took.
        rows: The rows of `measure`.
        shape: Size (C, H, W) of the image.
        configs: Those of training, pruning and fine-tuning.
    """
    cfg = load_config(configs[0], parse_options(pipeline.options))
    facts = {
        'configs': list(configs),
        'seed': cfg.get('randomness', {}).get('seed'),
        'seconds': pipeline.seconds(),
        **machine_facts(),
        'input_shape': list(shape),
        'two_stage': cfg.model.get('roi_head') is not None,
    }
    notes = []
    if 'metrics' in rows[0]:
        notes.append(f'tested by test_dataloader: {data_of(cfg.test_dataloader)}')
    if line := disturbed(rows):
        notes.append(line)
    cells = table_cells(rows)
    text = markdown(cells, {**facts, 'notes': notes})
    write_json(pipeline.work_dir / 'results.json', {'rows': rows, **facts})
    atomic_write(pipeline.work_dir / 'results.md', lambda tmp: tmp.write_text(text))
    print_table(cells)
    for note in notes:
        print(note)


def draw(candidate: Candidate, options: Sequence[str], pruned: str, path: Path) -> None:
    """Draw the channels that each layer of the pruned model kept.

    Args:
        candidate: The original model.
        options: The user's config overrides.
        pruned: A checkpoint with the structure.
        path: The image file to write.
    """
    options = [*options, *candidate.options]
    model = build_from(load_config(candidate.config, parse_options(options)))
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    plot_channels(layer_widths(PruneStructure.load(pruned), shapes), path)
