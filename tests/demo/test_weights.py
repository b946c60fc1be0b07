"""The demo's weights fit its model and are as good as docs/results.md says."""

import re

import pytest
import torch
from mmengine.config import Config
from support.tooling import ROOT

from mmgfp.apps.evaluation import runner_to_test
from mmgfp.engine.model_building import build_model
from mmgfp.utils.io import load_weights_only

DEMO = ROOT / 'configs/demo/retinanet_r18_fpn_digits.py'
WEIGHTS = DEMO.with_suffix('.pth')
IMAGES = 50


def test_weights_are_small_and_all_of_the_model():
    state = load_weights_only(WEIGHTS)['state_dict']
    assert WEIGHTS.stat().st_size < 2e6
    assert {v.dtype for v in state.values()} == {torch.float16, torch.int64}
    build_model(Config.fromfile(DEMO)).load_state_dict(state)  # strict


def test_weights_detect_as_the_docs_say(tmp_path):
    """Images are drawn one after another: fewer are the first of all."""
    text = ' '.join((ROOT / 'docs/results.md').read_text().split())
    (claimed,) = re.findall(rf'the first {IMAGES} of them alone, (\d\d\.\d)', text)
    config = Config.fromfile(DEMO)
    root = f'{tmp_path}/digits/'
    spec = dict(num_train=1, num_val=IMAGES)
    config.test_dataloader.dataset.update(data_root=root, spec=spec)
    config.test_evaluator.ann_file = root + 'annotations/val.json'
    config.load_from, config.work_dir = str(WEIGHTS), str(tmp_path / 'work')
    config.visualizer.name = str(tmp_path)
    metrics = runner_to_test(config).test()
    measured = 100 * metrics['coco/bbox_mAP']
    assert measured == pytest.approx(float(claimed), abs=0.2)
