"""The configs of the paper's tables run to their targets on data of the true size."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from support.tooling import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('*/*_prune_memory.py'))
#: Rows of the paper: what importance is divided by, and the share of the MACs.
ROWS = [('memory', 0.5), ('memory', 0.25), ('flops', 0.5), ('none', 0.5)]
#: One decision, made after the statistics of two iterations.
SHORT = [
    'load_from=None',
    'custom_hooks.0.schedule.type=one_shot',
    'custom_hooks.0.schedule.iterations=2',
    'custom_hooks.0.interval=1',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'randomness.seed=0',
]


def write_coco(root):
    """Write two noisy images of 1280 x 800, with boxes of all 80 classes."""
    rng = np.random.default_rng(0)
    names = CocoDataset.METAINFO['classes']
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    images = [
        dict(id=i, file_name=f'{i}.jpg', width=1280, height=800) for i in range(2)
    ]
    boxes = []
    for i in range(160):
        x, y, w, h = (
            int(v) for v in rng.integers([0, 0, 32, 32], [960, 480, 320, 320])
        )
        category = i % 80 + 1
        box = dict(id=i, image_id=i % 2, bbox=[x, y, w, h], area=w * h)
        boxes.append(dict(box, category_id=category, iscrowd=0))
    (root / 'annotations').mkdir(parents=True)
    (root / 'train2017').mkdir()
    for image in images:
        pixels = rng.integers(0, 256, (800, 1280, 3), dtype=np.uint8)
        cv2.imwrite(str(root / 'train2017' / image['file_name']), pixels)
    coco = dict(images=images, annotations=boxes, categories=categories)
    (root / 'annotations/instances_train2017.json').write_text(json.dumps(coco))


def write_imagenet(root):
    """Write a noisy image of 256 x 256 for each of the 1000 classes."""
    rng = np.random.default_rng(0)
    for i in range(1000):
        folder = root / f'train/n{i:08}'
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / '0.JPEG'), pixels)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folders = {k: tmp_path_factory.mktemp(k) / 'data' for k in ('coco', 'imagenet')}
    write_coco(folders['coco'])
    write_imagenet(folders['imagenet'])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize('row', ROWS, ids='{0[0]} {0[1]}'.format)
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_run_ends_at_the_target(path, row, data, run_tool, tmp_path):
    normalize, share = row
    kind, batch = ('coco', 1) if '_coco_' in path.stem else ('imagenet', 4)
    options = [
        *SHORT,
        f'data_root={data[kind]}/',
        f'train_dataloader.batch_size={batch}',
        f'custom_hooks.0.normalize={normalize}',
        f'custom_hooks.0.target.flops={share}',
    ]
    work = ('--work-dir', tmp_path)
    done = run_tool('train.py', path, *work, '--cfg-options', *options, limit=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (artifact,) = tmp_path.glob(f'*_flops{share * 100:.0f}.pth')
    checkpoint = torch.load(artifact, map_location='cpu', weights_only=True)
    macs = checkpoint['meta']['costs']['macs']
    assert share - 0.02 < macs['ratio'] <= share
    base = Config.fromfile(path).custom_hooks[0].input_shape
    assert tuple(checkpoint['meta']['input_shape']) == tuple(base)
