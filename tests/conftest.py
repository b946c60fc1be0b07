"""Fixtures that run MMEngine's runner once and are read by many tests."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.configs import PRUNE_CONFIG, small_prune_config
from support.tooling import ROOT


@pytest.fixture(autouse=True)
def any_algorithm():
    """A run that asks for deterministic algorithms asks for itself alone."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='session')
def pruning_run(tmp_path_factory):
    """A finished pruning run: its runner, config and the file it left."""
    from mmengine.runner import Runner

    folder = tmp_path_factory.mktemp('pruning')
    config = small_prune_config(folder)
    runner = Runner.from_cfg(config)
    runner.train()
    artifact = Path(config.work_dir) / f'{PRUNE_CONFIG.stem}_flops50.pth'
    parts = dict(runner=runner, config=config, artifact=artifact, folder=folder)
    return SimpleNamespace(**parts)


@pytest.fixture
def run_tool():
    """Run a tool of the repository in a process of its own."""

    def run(name, *args, limit=280):
        command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / name)]
        command += [str(a) for a in args]
        return subprocess.run(command, capture_output=True, text=True, timeout=limit)

    return run
