"""The files that a pruning run leaves when it reaches a target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from mmgfp.engine.artifact import (
    choices,
    circumstances,
    costs_in_numbers,
    save_artifact,
    weight_shapes,
)
from mmgfp.engine.runner_access import averaged_models
from mmgfp.pruner import ChannelPruner
from mmgfp.report.page import write_report
from mmgfp.report.run import read_runs


def save_compact(
    runner: Runner,
    pruner: ChannelPruner,
    label: str,
    iteration: int,
    importance: np.ndarray | None = None,
) -> None:
    """Write ``<config>_<label>.pth`` into the work directory, and ``report.html``.

    Args:
        runner: The runner; only its main process writes.
        pruner: The pruner of its model.
        label: What the file is called after, such as ``flops50``.
        iteration: Iterations of the run up to now.
        importance: Importance of the units at the decision that ended here, (U,).

    Raises:
        SavingError: If the artifact cannot be written.
    """
    if not is_main_process():
        return
    filename = runner.cfg.filename
    name = Path(filename).stem if filename else runner.experiment_name
    path = Path(runner.work_dir) / f'{name}_{label}.pth'
    units = pruner.units
    assert pruner.discovery is not None
    facts = (pruner.config, pruner.discovery, units.kept, importance, pruner.limits)
    meta = {
        'dataset_meta': getattr(runner.train_dataloader.dataset, 'metainfo', {}),
        'cfg': runner.cfg.pretty_text,
        'iter': iteration,
        'costs': costs_in_numbers(units.totals, units.full),
        **circumstances(pruner.config),
        **weight_shapes(units.shapes),
        **choices(*facts),
    }
    structure, model = units.structure(), pruner.compact()
    averaged = averaged_models(runner)
    if not averaged:
        save_artifact(path, model, structure, meta)
    else:  # as in MMEngine's checkpoints, the averaged weights are those to use
        average = pruner.compact(averaged[0].module)
        save_artifact(path, average, structure, meta, {'source': model})
    runner.logger.info(f'saved the compact model to {path}')
    _report(runner)


def _report(runner: Runner) -> None:
    path = Path(runner.work_dir) / 'report.html'
    try:
        write_report(read_runs([path.parent]), path)
    except Exception as error:  # of any kind: training goes on without a report
        reason = ' '.join(str(error).split())
        runner.logger.warning(f'no report: {type(error).__name__}: {reason}')
    else:
        runner.logger.info(f'a report on the run: {path}')
