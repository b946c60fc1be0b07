"""Every config we ship can be read, built and followed from stage to stage."""

import re
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from support.tooling import ROOT

from mmgfp import DistillationHook, FisherPruningHook, SparsityHook

CONFIGS = ROOT / 'configs'
#: Lists of runs; tests/apps/test_compare.py reads them.
NO_RUNS = ('_base_', 'compare')
LEAVES = sorted(p for p in CONFIGS.glob('*/*.py') if p.parent.name not in NO_RUNS)
PARTS = {'neck', 'head', 'bbox_head', 'rpn_head', 'roi_head'}
BCCD = 'bccd/retinanet_mobilenetv2_fpn_bccd.py'
BASELINES = {
    BCCD: 'RetinaNet',
    'demo/retinanet_r18_fpn_digits.py': 'RetinaNet',
    'cifar10/resnet20_cifar10.py': 'ImageClassifier',
}


def read(name):
    return Config.fromfile(CONFIGS / name)


def stage(kind):
    return [path for path in LEAVES if f'_{kind}' in path.stem]


def training_of(path):
    """The config of the training whose model a stage prunes or fine-tunes."""
    name = re.sub('_(prune|finetune).*', '.py', path.name)
    if path.with_name(name).exists():
        return Config.fromfile(path.with_name(name))
    library = 'mmdet' if '_coco' in name else 'mmpretrain'
    base = f'_base_ = "{library}::{path.parent.name}/{name}"'
    return Config.fromstring(base, '.py')  # names scopes as inheriting does


def by_name(path):
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize('path', LEAVES, ids=by_name)
def test_config_is_thin_and_complete_and_names_relative_data(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 50 and lines[0].startswith('# ')
    config = Config.fromfile(path)
    again = Config.fromstring(config.pretty_text, '.py')
    assert again.to_dict() == config.to_dict()
    assert config.data_root.startswith('data/') and config.data_root.endswith('/')
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        assert loader is None or loader.dataset.data_root == config.data_root


def test_metafiles_list_every_config():
    """For mim; none of them claims a result."""
    files = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    metas = [yaml.safe_load((ROOT / file).read_text()) for file in files]
    [collection] = [c for meta in metas for c in meta.get('Collections', [])]
    models = [model for meta in metas for model in meta.get('Models', [])]
    assert {m['In Collection'] for m in models} == {collection['Name']}
    assert {(m['Name'], m['Config']) for m in models} == {
        (path.stem, str(path.relative_to(ROOT))) for path in LEAVES
    }
    assert len(models) == len(LEAVES) and not any('Results' in m for m in models)


@pytest.mark.parametrize(('name', 'kind'), BASELINES.items())
def test_baseline_builds(name, kind):
    config = read(name)
    config.model.backbone.init_cfg = None
    init_default_scope(config.default_scope)
    assert type(MODELS.build(config.model)).__name__ == kind


@pytest.mark.parametrize('path', stage('prune'), ids=by_name)
def test_prune_configs_set_hook_and_rate_as_the_paper_does(path):
    config = Config.fromfile(path)
    [hook] = config.custom_hooks
    kind = hook.pop('type')
    assert kind == 'FisherPruningHook'
    FisherPruningHook(**hook)  # raises on anything out of range
    assert hook['target'] == {'flops': 0.5}
    assert hook['interval'] == (25 if config.default_scope == 'mmpretrain' else 10)
    assert config.train_cfg.type == 'IterBasedTrainLoop'
    assert config.model.backbone.get('frozen_stages', -1) == -1
    assert config.train_dataloader.sampler.type == 'InfiniteSampler'
    rate = training_of(path).optim_wrapper.optimizer.lr
    assert config.optim_wrapper.optimizer.lr == pytest.approx(rate / 10)
    assert config.param_scheduler == []


@pytest.mark.parametrize('path', stage('finetune'), ids=by_name)
def test_finetune_starts_from_what_pruning_writes_and_lasts_as_the_training(path):
    config = Config.fromfile(path)
    assert config.model.type == 'PrunedModel'
    assert config.model.structure == config.load_from == config.pruned
    [prune] = [
        other
        for other in stage('prune')
        if config.pruned == f'work_dirs/{other.stem}/{other.stem}_flops50.pth'
    ]
    assert prune.parent == path.parent
    # The structure belongs to the architecture that was pruned.
    pruned, rebuilt = Config.fromfile(prune).model, config.model.architecture
    for part in PARTS & set(rebuilt):
        assert pruned[part] == rebuilt[part]
    if path.parent.name == 'demo':  # its baseline is in the repository, converged
        return
    original = training_of(path)
    assert config.train_cfg == original.train_cfg
    assert config.param_scheduler == original.param_scheduler
    assert config.optim_wrapper == original.optim_wrapper


@pytest.mark.parametrize('path', stage('finetune_distill'), ids=by_name)
def test_teacher_is_what_pruning_started_from(path):
    [hook] = Config.fromfile(path).custom_hooks
    assert hook.pop('type') == 'DistillationHook'
    DistillationHook(**hook)  # raises on anything out of range
    prune = path.with_name(path.name.replace('_finetune_distill', '_prune'))
    assert hook['checkpoint'] == Config.fromfile(prune).load_from


@pytest.mark.parametrize('name', ['sparse80', '2to4'])
def test_sparse_configs_train_the_baseline_on(name):
    config = read(f'cifar10/resnet20_cifar10_{name}.py')
    baseline = read('cifar10/resnet20_cifar10.py')
    [hook] = config.custom_hooks
    assert hook.pop('type') == 'SparsityHook'
    assert SparsityHook(**hook).config.density == (0.2 if name == 'sparse80' else 0.5)
    assert config.load_from == 'work_dirs/resnet20_cifar10/epoch_3.pth'
    for key in ('model', 'train_cfg', 'param_scheduler', 'optim_wrapper'):
        assert config[key] == baseline[key]


@pytest.mark.parametrize('path', stage('prune'), ids=by_name)
def test_pruning_starts_from_weights_for_its_model(path):
    source = Config.fromfile(path).load_from
    if path.parent.name == 'demo':
        assert (ROOT / source).is_file()  # tests/demo/test_weights.py loads it
        return
    if '://' not in source:
        epochs = training_of(path).train_cfg.max_epochs
        baseline = path.stem.removesuffix('_prune')
        assert source == f'work_dirs/{baseline}/epoch_{epochs}.pth'
        return
    root = 'mmdetection/v2.0' if '_coco' in path.stem else 'mmclassification/v0'
    folder = path.parent.name
    assert source.startswith(f'https://download.openmmlab.com/{root}/{folder}/')
    letters = re.sub('[^a-z0-9]', '', Path(source).stem)
    assert letters.startswith(re.match('[a-z]+', path.stem).group())


def test_bccd_is_tested_on_what_nothing_is_tuned_on():
    config = read(BCCD)
    files = [config[f'{s}_dataloader'].dataset.ann_file for s in ('train', 'val')]
    test = config.test_dataloader.dataset.ann_file
    assert test == 'annotations/test.json' and test not in files
    assert config.test_evaluator.ann_file == config.data_root + test
