"""Fixtures that run MMEngine's runner once and are read by many tests."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parent.parent
PRUNE_CONFIG = ROOT / 'configs/demo/retinanet_r18_fpn_digits_prune.py'


def small_prune_config(folder, **hook):
    """The demo's pruning config on few images, with random weights."""
    config = Config.fromfile(PRUNE_CONFIG)
    spec = dict(num_train=16, num_val=4, size=64)
    root = str(folder / 'digits') + '/'
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if loader is not None:
            loader.batch_size = 2
            loader.dataset.data_root = root
            loader.dataset.spec = spec
    config.model.backbone.base_channels = 8
    config.model.neck.in_channels = [8, 16, 32, 64]
    config.load_from = None
    config.work_dir = str(folder / 'work')
    # MMEngine hands out visualizers by name, those of earlier runs as well.
    config.visualizer.name = str(folder)
    config.train_cfg.max_iters = 12
    config.default_hooks.checkpoint.interval = 4
    config.custom_hooks[0].update(
        interval=2, units_per_step=150, min_channels=2, input_shape=(3, 64, 64)
    )
    config.custom_hooks[0].update(hook)
    return config


@pytest.fixture(scope='session')
def pruning_run(tmp_path_factory):
    """A finished pruning run: its runner, config and the file it left."""
    from mmengine.runner import Runner

    folder = tmp_path_factory.mktemp('pruning')
    config = small_prune_config(folder)
    runner = Runner.from_cfg(config)
    runner.train()
    artifact = Path(config.work_dir) / f'{PRUNE_CONFIG.stem}_flops50.pth'
    return SimpleNamespace(
        runner=runner, config=config, artifact=artifact, folder=folder
    )


@pytest.fixture
def run_tool():
    """Run a tool of the repository in a process of its own."""

    def run(name, *args):
        command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / name)]
        command += [str(a) for a in args]
        return subprocess.run(command, capture_output=True, text=True, timeout=280)

    return run
