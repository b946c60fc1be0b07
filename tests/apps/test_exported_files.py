"""Exported files, tested by the test tool: what they predict is what the model does."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from support.plain_onnx import write_plain_onnx
from support.small_configs import config_of
from support.tooling import ROOT, load_tool

from mmgfp.apps.evaluation import evaluate_file
from mmgfp.engine.model_building import build_model, init_weights
from mmgfp.export.graphs import end_to_end_graph, raw_graph
from mmgfp.runtimes import open_model
from mmgfp.utils.errors import ConfigError

SIZE = (64, 64)


@pytest.fixture
def exported(tmp_path):
    """Write a config, weights that tell objects apart, and a file; all by kind."""

    def write(kind, size=SIZE, graph=end_to_end_graph, batch=1):
        config = config_of(tmp_path, kind)
        config.train_cfg = dict(by_epoch=True, max_epochs=1)
        config.dump(tmp_path / 'small.py')
        torch.manual_seed(0)
        model = build_model(config)
        init_weights(model)
        for name, parameter in model.named_parameters():
            if name.endswith(('retina_cls.weight', 'fc_cls.weight', 'head.fc.weight')):
                torch.nn.init.normal_(parameter, std=0.5)  # scores far apart
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'small.pth')
        file = tmp_path / 'small.onnx'
        write_plain_onnx(graph(model), torch.rand(batch, 3, *size), file)
        return tmp_path / 'small.py', tmp_path / 'small.pth', file

    return write


@pytest.fixture
def run_test(monkeypatch, tmp_path):
    """Run the test tool in this process; return metrics and predictions."""

    def run(*args):
        out, metrics = tmp_path / 'out.pkl', tmp_path / 'metrics.json'
        flags = ('--out', out, '--json', metrics, '--work-dir', tmp_path / 'work')
        monkeypatch.setattr(sys, 'argv', ['test.py', *map(str, (*args, *flags))])
        load_tool('test').main()
        return json.loads(metrics.read_text()), pickle.loads(out.read_bytes())

    return run


def agreement(expected, got):
    """Share of detections with a twin: same class, equal score, equal box."""
    one, other = expected['pred_instances'], got['pred_instances']
    apart = (one['bboxes'][:, None] - other['bboxes'][None]).abs().amax(-1)  # (K, K')
    twins = apart < 0.05
    twins &= (one['scores'][:, None] - other['scores'][None]).abs() < 1e-4
    twins &= one['labels'][:, None] == other['labels'][None]
    assert len(one['bboxes']) == len(other['bboxes']) > 0
    return twins.any(1).float().mean().item()


@pytest.mark.parametrize('kind', ['retinanet', 'mask'])
def test_detections_are_those_of_the_checkpoint(kind, exported, run_test):
    config, checkpoint, file = exported(kind, batch=3)  # 4 images: 3 and 1
    expected_metrics, expected = run_test(config, checkpoint)
    metrics, predictions = run_test(config, file, '--runtime', 'onnxruntime')
    assert len(predictions) == len(expected) == 4
    shares = [agreement(*pair) for pair in zip(expected, predictions, strict=True)]
    assert np.mean(shares) > 0.98
    assert metrics == pytest.approx(expected_metrics, abs=1e-3)
    if kind == 'mask':
        assert 'coco/segm_mAP' in metrics


def test_scores_are_those_of_the_checkpoint(exported, run_test):
    config, checkpoint, file = exported('classifier', batch=4)
    expected_metrics, expected = run_test(config, checkpoint)
    metrics, predictions = run_test(config, file, '--runtime', 'openvino')
    assert metrics == expected_metrics
    for one, other in zip(expected, predictions, strict=True):
        torch.testing.assert_close(
            other['pred_score'], one['pred_score'], atol=1e-4, rtol=0
        )
        assert torch.equal(other['pred_label'], one['pred_label'])


def test_smaller_images_are_padded_and_larger_ones_fitted(exported, run_test):
    config, _, file = exported('retinanet', size=(32, 96))
    _, predictions = run_test(config, file, '--runtime', 'onnxruntime')
    for prediction in predictions:
        # The image of 64 x 64 becomes 32 x 32, and its boxes are those of 64 x 64.
        assert prediction['scale_factor'] == (0.5, 0.5)
        boxes = prediction['pred_instances']['bboxes']
        assert 32 < boxes.max() <= 64
        assert boxes.min() >= 0


def test_refuses_files_without_results_and_of_other_sizes(exported, run_test):
    config, _, file = exported('classifier', size=(32, 32))
    with pytest.raises(ValueError, match=r'of size \(32, 32\), which the file fixes'):
        run_test(config, file, '--runtime', 'onnxruntime')
    with pytest.raises(ValueError, match='runtime must be one that opens .onnx'):
        run_test(config, file, '--runtime', 'torchscript')
    config, _, file = exported('retinanet', graph=raw_graph)
    with pytest.raises(ValueError, match='dets and labels, or scores .got outputs'):
        run_test(config, file, '--runtime', 'onnxruntime')


def test_files_are_evaluated_one_after_the_other(exported):
    config, _, file = exported('retinanet', batch=2)
    config = Config.fromfile(config)
    assert config.visualizer
    # The first one's folder is gone by then.
    first, second = (evaluate_file(config, file) for _ in range(2))
    assert first == second
    assert 'coco/bbox_mAP' in first


OPEN = """
import sys
from mmgfp.runtimes import open_model
assert 'torchvision' not in sys.modules
print(*open_model(sys.argv[1], 'torchscript').inputs)
"""


def test_torchscript_files_find_ops_of_torchvision(tmp_path):
    @torch.jit.script
    def keep(boxes: torch.Tensor, scores: torch.Tensor):
        return torch.ops.torchvision.nms(boxes, scores, 0.5)

    file = tmp_path / 'nms.pt'
    keep.save(str(file))
    command = [sys.executable, '-c', OPEN, str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    file.write_bytes(b'cut short')
    with pytest.raises(ConfigError, match='must be a whole TorchScript file'):
        open_model(file)


def test_fitting_leaves_other_steps_as_they_are():
    from mmgfp.export.fitting import fitted_pipeline

    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(10, 20), keep_ratio=False),
        dict(type='Pad', size_divisor=32),
    ]
    pipeline = [Config(step).to_dict() for step in steps]
    expected = [steps[0], {**steps[1], 'scale': (48, 32)}, steps[2]]
    assert fitted_pipeline(pipeline, (32, 48)) == expected
