"""Names that configs may use, and what importing mmgfp brings along."""

import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.registry import HOOKS, MODELS, DefaultScope

from mmgfp import ExactResumeHook, FisherPruningHook, PrunedModel


@pytest.mark.parametrize('prefix', ['', 'mmgfp.'])
@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain'])
def test_hooks_and_models_are_found_by_name_in_any_scope(scope, prefix):
    with DefaultScope.overwrite_default_scope(scope):
        pruning = HOOKS.build(dict(type=f'{prefix}FisherPruningHook'))
        assert HOOKS.build(dict(type=f'{prefix}ChannelPruningHook')).config
        resume = HOOKS.build(dict(type=f'{prefix}ExactResumeHook'))
        with pytest.raises(TypeError, match='architecture'):
            MODELS.build(dict(type=f'{prefix}PrunedModel'))
    assert type(pruning) is FisherPruningHook and pruning.priority == 'HIGH'
    assert type(resume) is ExactResumeHook and resume.priority == 'LOW'
    assert MODELS.get('mmgfp.PrunedModel') is PrunedModel


def test_import_brings_neither_mmdet_nor_opencv_along():
    code = "import mmgfp, sys; assert not {'mmdet', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_run_finds_all_registries(pruning_run):
    (log,) = Path(pruning_run.config.work_dir).glob('*/*.log')
    assert 'pruned 150 units' in log.read_text()
    assert 'Failed to search registry' not in log.read_text()
