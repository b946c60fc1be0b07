"""The tool that prunes without training, on every kind of model."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from support.small_configs import config_of
from support.tooling import load_tool

from mmgfp.apps.prune_run import pruning_options
from mmgfp.apps.refitting_data import refitting_batches
from mmgfp.apps.tables import main_metric
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.deploy import read_deployable
from mmgfp.engine.model_building import build_model
from mmgfp.utils.errors import ConfigError


def start(folder, kind):
    """A config that knows nothing of pruning, and a checkpoint."""
    config, path = config_of(folder, kind), folder / 'net.py'
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    config.dump(path)
    torch.manual_seed(0)
    weights = build_model(Config.fromfile(path)).state_dict()
    torch.save({'state_dict': weights}, folder / 'start.pth')
    return path, folder / 'start.pth'


def test_images_are_those_of_training_as_in_testing(tmp_path):
    """Resized with their boxes, which testing keeps at the size of the file."""
    cfg = config_of(tmp_path, 'retinanet')
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'] == 'Resize':
            step['scale'] = (128, 128)
    batches = refitting_batches(cfg, 12, 4)
    assert [len(batch['inputs']) for batch in batches] == [4, 4, 4]
    names = [s.img_path for batch in batches for s in batch['data_samples']]
    assert len(set(names)) == 12
    shapes = {tuple(image.shape) for b in batches for image in b['inputs']}
    assert shapes == {(3, 128, 128)}
    root = cfg.train_dataloader.dataset.data_root
    coco = json.loads(Path(root, 'annotations/train.json').read_text())
    ids = {image['file_name']: image['id'] for image in coco['images']}
    sample = batches[0]['data_samples'][0]
    image = ids[sample.img_path.rpartition('/')[2]]
    boxes = [a['bbox'] for a in coco['annotations'] if a['image_id'] == image]
    corners = [[2 * x, 2 * y, 2 * (x + w), 2 * (y + h)] for x, y, w, h in boxes]
    assert sample.gt_instances.bboxes.tensor.tolist() == corners
    again = refitting_batches(cfg, 12, 4)
    assert [s.img_path for b in again for s in b['data_samples']] == names
    assert not BatchCalls(build_model(cfg), batches[0]).without_boxes


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['retinanet', 'faster', 'mask', 'classifier'])
def test_the_tool_prunes_tests_and_deploys(kind, run_tool, tmp_path):
    config, checkpoint = start(tmp_path, kind)
    work = tmp_path / 'work'
    command = ['prune.py', config, checkpoint, '--no-train', '--work-dir', work]
    command += ['--target', 'flops=0.6', '--images', 8, '--batch-size', 2]
    done = run_tool(*command, '--divisor', 2, '--rounds', 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert '2 cuts in' in done.stdout
    said = json.loads((work / 'summary.json').read_text())
    before, after = said['rows']
    assert after['macs'] <= 0.6 * before['macs'] and 'metric' in after
    refitted = [x for r in said['rounds'] for x in r['layers'] if not x['reason']]
    assert refitted and all(x['after'] < x['before'] for x in refitted)
    name = 'net_flops60'
    # With the original's config and with the one that was written.
    for cfg in (config, work / f'{name}.py'):
        item = read_deployable(Config.fromfile(cfg), work / f'{name}.pth')
        assert item.meta['costs']['macs']['ratio'] <= 0.6
    metrics = tmp_path / 'metrics.json'
    files = work / f'{name}.py', work / f'{name}.pth'
    done = run_tool('test.py', *files, '--json', metrics)
    assert done.returncode == 0, done.stderr[-2000:]
    tested = main_metric(json.loads(metrics.read_text()))[1]
    assert after['metric'] == pytest.approx(tested)


def test_what_is_refused(tmp_path):
    cfg = config_of(tmp_path, 'classifier')
    with pytest.raises(ConfigError, match='--images must be at least 2 batches of 4'):
        refitting_batches(cfg, 7)
    cfg.train_dataloader = None
    with pytest.raises(ConfigError, match='train_dataloader must be in the config'):
        refitting_batches(cfg, 7)
    with pytest.raises(ConfigError, match='target'):
        pruning_options(cfg, target=dict(speed=0.5))


@pytest.mark.parametrize('flags', [[], ['--no-train']])
def test_errors_come_in_one_line(flags, tmp_path, monkeypatch):
    args = ['prune.py', 'net.py', 'net.pth', '--target', 'flops=0.5', '--work-dir', 'x']
    monkeypatch.setattr('sys.argv', [*args, *flags])
    words = 'checkpoint must be' if flags else 'tools/train.py with a config'
    with pytest.raises(ConfigError, match=words):
        load_tool('prune').main()
