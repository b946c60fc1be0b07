"""Runs to a latency target with made-up profiles: logs, artifacts, resuming."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from support.configs import FASTER, slim, small_prune_config
from support.latency import made_up, write
from support.runs import tiny_classifier
from support.toy_runner import hook_of
from support.toys import TinyDetector, images, square_loss

from mmgfp import GroupFisherPruner
from mmgfp.discovery.profile import profile_layers
from mmgfp.engine.demo_batch import demo_calls
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import ConfigError


def profiled(config, shape, path, **origin):
    """Write a profile of a config's model; its hook gets it and a latency target."""
    model = build_model(config)
    profiles = demo_calls(config, model).profile(model, shape)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    origin = dict(input_shape=list(shape)) | origin
    made = write(made_up(shapes, profiles, origin), path)
    options = dict(latency_profile=made, input_shape=None, normalize='latency')
    config.custom_hooks[0].update(options)
    config.custom_hooks[0].target = dict(latency=0.6)
    return config


def retinanet(folder):
    return small_prune_config(folder), (3, 64, 64)


def faster_rcnn(folder):
    config = small_prune_config(folder)
    config.model = slim(FASTER).model
    config.model.roi_head.bbox_head.num_classes = 10
    config.model.backbone.init_cfg = None
    return config, (3, 64, 64)


def classifier(folder):
    config = tiny_classifier(folder)
    config.custom_hooks[0].update(divisor=1, units_per_step=60)
    return config, (3, 16, 16)


@pytest.mark.parametrize('make', [retinanet, faster_rcnn, classifier])
def test_a_run_reaches_its_latency(make, tmp_path):
    config = profiled(*make(tmp_path), tmp_path / 'table.json')
    runner = Runner.from_cfg(config)
    runner.train()
    pruner = hook_of(runner).pruner
    assert pruner.done
    ratio = pruner.units.totals.ratio('latency', pruner.units.full)
    assert 0.4 < ratio <= 0.6
    (path,) = Path(config.work_dir).glob('*_latency60.pth')
    meta = torch.load(path, weights_only=True)['meta']
    assert meta['costs']['latency']['ratio'] == ratio
    assert meta['latency_profile'] == 'onnxruntime 9.9, cpu, 1 thread'
    (log,) = Path(config.work_dir).glob('*/*.log')
    time = f'{pruner.units.totals["latency"]:.4g} ms'
    assert f'{meta["latency_profile"]}) {time}' in log.read_text()


def test_a_run_aligns_as_its_profile_says(tmp_path):
    config = profiled(*retinanet(tmp_path), tmp_path / 'table.json')
    config.custom_hooks[0].update(divisor='auto', target=dict(latency=0.8))
    runner = Runner.from_cfg(config)
    runner.train()
    pruner = hook_of(runner).pruner
    (log,) = Path(config.work_dir).glob('*/*.log')
    [divisor] = re.findall(r'divisor=(\d+), by the latency profile', log.read_text())
    units = pruner.units
    widths = (units.sizes - units.removed) * units.widths
    assert pruner.done and np.all(widths[units.removed > 0] % int(divisor) == 0)


def test_a_run_goes_on_with_its_profile_only(tmp_path):
    config = profiled(*retinanet(tmp_path), tmp_path / 'table.json')
    config.custom_hooks[0].update(units_per_step=5)
    config.train_cfg.max_iters = 4
    first = Runner.from_cfg(config)
    first.train()
    other = profiled(config, (3, 64, 64), tmp_path / 'other.json', threads=2)
    other.custom_hooks[0].update(units_per_step=5)
    other.resume, other.experiment_name = True, 'other'
    other.train_cfg.max_iters = 6
    with pytest.raises(ConfigError, match='latency_profile must be .*the profile'):
        Runner.from_cfg(other).train()
    moved = (tmp_path / 'table.json').rename(tmp_path / 'moved.json')
    other.custom_hooks[0].latency_profile = str(moved)
    other.experiment_name = 'moved'
    second = Runner.from_cfg(other)
    second.train()
    assert hook_of(second).pruner.iteration == 6


def toy(path, size=8, **options):
    """A plain pruner of a toy detector, prepared with a profile of some size."""
    torch.manual_seed(0)
    model, batch = TinyDetector(), images()
    sized = torch.zeros(1, 3, size, size)
    profiles = profile_layers(model, lambda m: m(sized), 1)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    origin = dict(input_shape=[3, size, size])
    options['latency_profile'] = write(made_up(shapes, profiles, origin), path)
    pruner = GroupFisherPruner(model, interval=1, **options)

    def loss(m):
        return square_loss(m(batch))

    pruner.prepare(loss, lambda m: m(batch), len(batch))
    return pruner, loss


def test_plain_modules_have_latency_too(tmp_path):
    pruner, loss = toy(tmp_path / 'table.json', target=dict(latency=0.7))
    while not pruner.done:
        loss(pruner.model).backward()
        pruner.step()
        pruner.model.zero_grad()
    units = pruner.units
    assert units.totals.ratio('latency', units.full) <= 0.7


def test_another_size_is_refused_by_plain_modules(tmp_path):
    with pytest.raises(ConfigError, match=r'of this input size.*\(3, 32, 32\)'):
        toy(tmp_path / 'table.json', size=32, target=dict(latency=0.7))
