"""The image size for costs: who names it, and in which order they are asked."""

import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmgfp.apps.input_shape import deployed_shape, profiled_shape, size_in_testing
from mmgfp.utils.errors import ConfigError


def config(*steps, **entries):
    loader = dict(dataset=dict(type='Repeat', dataset=dict(pipeline=list(steps))))
    return Config(dict(test_dataloader=loader, default_scope='mmdet', **entries))


@pytest.mark.parametrize(
    ('steps', 'size'),
    [
        ([dict(type='Resize', scale=(320, 240), keep_ratio=True)], (240, 320)),
        ([dict(type='mmdet.Resize', scale=96)], (96, 96)),
        ([dict(type='Resize', scale=(90, 60)), dict(type='Pad', size=(128, 64))],
         (64, 128)),
        ([dict(type='Resize', scale=(90, 60)), dict(type='Pad', size_divisor=32)],
         (64, 96)),
        ([dict(type='Resize', scale=(90, 60)), dict(type='Pad', pad_to_square=True)],
         (90, 90)),
        ([dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224)],
         (224, 224)),
        ([dict(type='ResizeEdge', scale=256)], None),  # how wide depends on the image
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], None),
        ([dict(type='PackDetInputs')], None),
    ],
)  # fmt: skip
def test_size_after_the_test_pipeline(steps, size):
    assert size_in_testing(config(*steps)) == size


def test_batches_are_padded():
    cfg = config(
        dict(type='Resize', scale=(90, 60)),
        model=dict(data_preprocessor=dict(pad_size_divisor=32)),
    )
    assert size_in_testing(cfg) == (64, 96)


@pytest.mark.parametrize('name', ['structure.json', 'pruned.pth'])
def test_who_names_the_size_in_their_order(tmp_path, name):
    path = tmp_path / name
    if path.suffix == '.json':
        path.write_text(json.dumps(dict(version=1, tensors={}, input_shape=[4, 7, 8])))
    else:
        torch.save({'meta': {'input_shape': [4, 7, 8]}}, path)
    model = dict(type='PrunedModel', structure=str(path))
    model['architecture'] = dict(backbone=dict(in_channels=4))
    cfg = config(dict(type='Resize', scale=(32, 16)), model=model)
    item = SimpleNamespace(meta={'input_shape': (4, 5, 6)}, original=None)
    assert deployed_shape([4, 9, 9], item, cfg)[0] == [4, 9, 9]
    assert deployed_shape(None, item, cfg) == ((4, 5, 6), 'as the checkpoint says')
    item.meta = {}
    assert deployed_shape(None, item, cfg) == ([4, 7, 8], f'as {path} says')
    cfg.model = cfg.model.architecture
    size, source = deployed_shape(None, item, cfg)
    assert (size, source) == ((4, 16, 32), 'as images are resized for testing')
    cfg.test_dataloader = None
    size, source = deployed_shape(None, item, cfg)
    assert (size, source) == ((4, 800, 1280), "the library's default")


def test_who_names_the_size_of_a_profile(tmp_path):
    cfg = config(dict(type='Resize', scale=(32, 16)))
    assert profiled_shape([3, 9, 9], [3, 8, 8], cfg, 3)[0] == [3, 9, 9]
    hook = 'as the pruning hook says'
    assert profiled_shape(None, [3, 8, 8], cfg, 3) == ([3, 8, 8], hook)
    cfg.dump(tmp_path / 'net_prune.py')
    named = Config.fromfile(tmp_path / 'net_prune.py')
    hook = 'as the pruning hook in net_prune.py says'
    assert profiled_shape(None, [3, 8, 8], named, 3) == ([3, 8, 8], hook)
    assert profiled_shape(None, None, cfg, 4)[0] == (4, 16, 32)
    cfg.test_dataloader = None
    default = ((3, 800, 1280), "the library's default")
    assert profiled_shape(None, None, cfg, 3) == default


def test_a_structure_of_a_wrong_size_is_refused(tmp_path):
    path = tmp_path / 'structure.json'
    path.write_text(json.dumps(dict(input_shape=[3, 10**6, 64])))
    cfg = config(model=dict(type='PrunedModel', structure=str(path)))
    item = SimpleNamespace(meta={}, original=None)
    with pytest.raises(ConfigError, match=rf'meta.input_shape of {path} must be'):
        deployed_shape(None, item, cfg)
