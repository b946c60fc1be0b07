"""Overrides reach the datasets, and missing data is said in one line."""

import pytest
from mmengine.config import Config

from mmgfp.apps.run_config import prepare_config, spread_variables
from mmgfp.utils.errors import ConfigError

TEXT = """
data_root = 'data/cells/'
pruned = 'work_dirs/a.pth'
load_from = pruned
model = dict(type='PrunedModel', structure=pruned, note='data/cellsx')
dataset = dict(type='CocoDataset', data_root=data_root, ann_file='train.json')
train_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dataset))
val_evaluator = [dict(ann_file=data_root + 'val.json')]
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(TEXT)

    def load(**options):
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(options)
        spread_variables(cfg, options)
        return cfg

    return load


def test_data_root_moves_every_path_below_it(config):
    cfg = config(data_root='/disk/cells')
    assert cfg.train_dataloader.dataset.dataset.data_root == '/disk/cells/'
    assert cfg.val_evaluator[0].ann_file == '/disk/cells/val.json'
    assert cfg.model.note == 'data/cellsx'


def test_pruned_is_spread_to_structure_and_weights(config):
    cfg = config(pruned='b.pth')
    assert cfg.load_from == cfg.model.structure == 'b.pth'


def test_other_options_change_nothing_else(config):
    before, after = config(), config(load_from='b.pth')
    assert after.load_from == 'b.pth'
    assert after.model == before.model
    assert after.train_dataloader == before.train_dataloader


def test_missing_data_is_said(config, tmp_path):
    cfg = config()
    place = 'train_dataloader.dataset must be present at data/cells/train.json'
    words = f'{place}.*data_root'
    with pytest.raises(ConfigError, match=words):
        prepare_config(cfg, ['train', 'val'])
    (tmp_path / 'train.json').touch()
    options = {'data_root': str(tmp_path)}
    cfg.merge_from_dict(options)
    spread_variables(cfg, options)
    prepare_config(cfg, ['train', 'val'])


def test_mmpretrain_gets_its_collate_function(config):
    cfg = config()
    prepare_config(cfg, [])
    assert 'collate_fn' not in cfg.train_dataloader
    cfg.default_scope = 'mmpretrain'
    prepare_config(cfg, [])
    assert cfg.train_dataloader.collate_fn.type == 'default_collate'
