"""Exported files tested by MMEngine's runner, with a config's own evaluator."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mmgfp.apps.cli import reading_config
from mmgfp.apps.run_config import build_runner, check_entries, prepare_config
from mmgfp.export.exported_model import ExportedModel
from mmgfp.export.fitting import fit_dataset
from mmgfp.runtimes import Session, open_model


def fit_to_file(cfg: Config, session: Session) -> None:
    """Let the test pipeline give images that fit into what the file reads, in place."""
    size = next(iter(session.inputs.values()), ())[2:]
    if len(size) == 2 and None not in size:
        fit_dataset(cfg.test_dataloader.dataset, [side or 0 for side in size])


def runner_to_test(cfg: Config) -> Runner:
    """Build a runner with its test loop.

    Raises:
        ConfigError: If it cannot be built.
    """
    with reading_config(cfg):
        runner = build_runner(cfg)
        runner.test_loop  # noqa: B018 - is built when it is read
    return runner


def evaluate_file(
    cfg: Config, path: Path, runtime: str | None = None
) -> dict[str, Any]:
    """Test an exported file on the test set of a config.

    Args:
        cfg: The config; it is left as it is.
        path: A file with end-to-end outputs.
        runtime: A name in `mmgfp.runtimes.RUNTIMES`, by default what opens the file.

    Returns:
        The metrics.
    """
    cfg = copy.deepcopy(cfg)
    prepare_config(cfg, ['test'])
    check_entries(cfg, 'test')
    session = open_model(path, runtime)
    fit_to_file(cfg, session)
    cfg.load_from, cfg.log_level = None, 'ERROR'
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        # MMEngine hands out loggers and visualizers by name: one of an evaluation
        # before would write to that one's folder, which is gone.
        cfg.experiment_name = Path(folder).name
        if cfg.get('visualizer'):
            cfg.visualizer.name = cfg.experiment_name
        runner = runner_to_test(cfg)
        runner.model = ExportedModel(session, runner.model)
        return runner.test()
