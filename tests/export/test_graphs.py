"""Exported graphs repeat what MMDetection and MMPretrain predict."""

import copy
import io
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from support.configs import classifier
from support.exporting import (
    ONE_STAGE,
    TWO_STAGE,
    assert_detections,
    detector_config,
    lively_detector,
    onnx_file,
    predictions,
)
from support.plain_onnx import write_plain_onnx

from mmgfp.discovery.discover import trace_model
from mmgfp.discovery.grouping import build_groups
from mmgfp.discovery.unit_sets import random_units
from mmgfp.discovery.verify import masked_and_compact
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model
from mmgfp.export.graphs import end_to_end_graph, raw_graph
from mmgfp.runtimes import open_model

#: Their files are written in slow tests alone.
SLOW = ('fsaf', 'atss', 'fcos', 'gfl', 'rtmdet', 'ssdlite')
DETECTORS = (*ONE_STAGE, *TWO_STAGE)


def run_file(path, image, runtime=None):
    """Outputs of a file, in order."""
    session = open_model(path, runtime, threads=1)
    return list(session.run({'image': image.numpy()}).values())


@pytest.fixture(
    scope='module',
    params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in DETECTORS],
)
def exported(request, tmp_path_factory):
    """A detector's graph and the file of it, an image, predictions."""
    model, image = lively_detector(request.param)
    graph = end_to_end_graph(model)
    file = tmp_path_factory.mktemp('onnx') / f'{request.param}.onnx'
    return graph, onnx_file(graph, image, file), image, predictions(model, image)


@pytest.mark.parametrize('name', DETECTORS)
def test_graph_detects_as_the_model_predicts(name):
    model, image = lively_detector(name)
    with torch.no_grad():
        assert_detections(end_to_end_graph(model)(image), predictions(model, image))


def test_file_detects_as_the_model_predicts(exported):
    _, file, image, predicted = exported
    assert_detections(run_file(file, image), predicted, strays=1)
    # It is free in the number of images.
    assert_detections(run_file(file, image[1:]), predicted[1:], strays=1)


def test_file_detects_in_openvino(exported):
    _, file, image, predicted = exported
    assert_detections(run_file(file, image, 'openvino'), predicted, strays=1)


def test_file_has_ops_of_onnx_alone(exported):
    graph, file, *_ = exported
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {''}
    assert [(o.domain, o.version) for o in model.opset_import] == [('', 17)]
    assert tuple(o.name for o in model.graph.output) == graph.outputs


def test_masks_paste_to_those_that_are_predicted(tmp_path):
    model, image = lively_detector('mask')
    predicted = predictions(model, image)
    graph = end_to_end_graph(model)
    with torch.no_grad():
        outputs = graph(image)
    file = onnx_file(graph, image, tmp_path / 'mask.onnx')
    assert graph.outputs == ('dets', 'labels', 'masks')
    for dets, labels, masks in (outputs, map(torch.as_tensor, run_file(file, image))):
        assert masks.shape == (2, 40, 28, 28) and (masks[labels < 0] == 0).all()
        for boxes, probabilities, want in zip(dets, masks, predicted, strict=True):
            count = len(want)
            pasted, _ = _do_paste_mask(
                probabilities[:count, None], boxes[:count, :4], *image.shape[2:], False
            )
            assert ((pasted >= 0.5) == want.masks).float().mean() > 0.999
            assert (want.masks.sum((1, 2)) > 0).sum() >= 10


@pytest.mark.parametrize(
    'name', [pytest.param('retinanet', marks=pytest.mark.slow), 'mask']
)
def test_nothing_detected(name, tmp_path, monkeypatch):
    model, image = lively_detector(name)
    head = model.roi_head if name == 'mask' else model.bbox_head
    monkeypatch.setitem(head.test_cfg, 'score_thr', 1.0)
    graph = end_to_end_graph(model)
    with torch.no_grad():
        results = [graph(image)]
    file = onnx_file(graph, image, tmp_path / 'none.onnx')
    results += [run_file(file, image, r) for r in ('onnxruntime', 'openvino')]
    for dets, labels, *masks in results:
        assert dets.shape == (2, 40, 5) and (dets == 0).all() and (labels == -1).all()
        assert all(m.shape == (2, 40, 28, 28) and (m == 0).all() for m in masks)


@pytest.mark.parametrize('name', ['retinanet', 'faster'])
def test_pruned_model(name, tmp_path):
    """Every other unit of a detector goes; its file detects what it predicts."""
    model, image = copy.deepcopy(lively_detector(name))
    calls = BatchCalls(model, demo_batch(detector_config(name), 2, (64, 64)))
    groups = build_groups(model, trace_model(model, calls.loss).trace).groups
    kept = random_units(groups, 0.5, np.random.default_rng(0))
    small = masked_and_compact(model, groups, kept)[1].eval()
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(
        p.numel() for p in model.parameters()
    )
    head = small.roi_head if name == 'faster' else small.bbox_head
    head.test_cfg.score_thr = 0.05
    predicted = predictions(small, image)
    graph = end_to_end_graph(small)
    file = onnx_file(graph, image, tmp_path / 'pruned.onnx')
    for runtime in ('onnxruntime', 'openvino'):
        assert_detections(run_file(file, image, runtime), predicted, strays=1)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['retinanet', 'yolox', 'faster', 'mask'])
def test_exporter_of_dynamo(name, tmp_path):
    """It fixes the number of images, but the results are the same."""
    model, image = lively_detector(name)
    graph = end_to_end_graph(model)
    file = tmp_path / 'dynamo.onnx'
    options = dict(dynamo=True, opset_version=18, verbose=False)
    options |= dict(input_names=['image'], output_names=list(graph.outputs))
    torch.onnx.export(graph, (image,), str(file), **options)
    assert {node.domain for node in onnx.load(file).graph.node} == {''}
    for runtime in ('onnxruntime', 'openvino'):
        outputs = run_file(file, image, runtime)
        assert_detections(outputs, predictions(model, image), strays=1)


def test_torchscript_is_free_in_the_number_of_images():
    model, image = lively_detector('retinanet')
    graph = end_to_end_graph(model)
    with torch.no_grad():
        traced = torch.jit.trace(graph, image, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    three = torch.cat([image, image[:1]])
    with torch.no_grad():
        outputs = torch.jit.load(buffer)(three)
    assert_detections(outputs, predictions(model, three))


def test_classifier(tmp_path):
    torch.manual_seed(0)
    backbone = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)
    model = build_model(classifier(backbone, 64)).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = torch.stack([s.pred_score for s in model.predict(image)])
    graph = end_to_end_graph(model)
    (scores,) = run_file(onnx_file(graph, image, tmp_path / 'cls.onnx'), image)
    assert graph.outputs == ('scores',)
    torch.testing.assert_close(torch.as_tensor(scores), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    'name', ['retinanet', pytest.param('faster', marks=pytest.mark.slow)]
)
def test_raw_outputs(name, tmp_path):
    model, image = lively_detector(name)
    graph = raw_graph(model)
    head = model.rpn_head if name == 'faster' else model.bbox_head
    with torch.no_grad():
        scores, boxes = head(model.extract_feat(image))
    names = [f'output_{i}_{level}' for i in range(2) for level in range(len(scores))]
    assert graph.outputs == tuple(names)
    outputs = run_file(onnx_file(graph, image, tmp_path / 'raw.onnx'), image)
    for have, want in zip(outputs, [*scores, *boxes], strict=True):
        torch.testing.assert_close(torch.as_tensor(have), want, atol=1e-3, rtol=1e-3)


SIGNALLED = """
import signal, sys
from mmgfp.runtimes import open_model
first = open_model(sys.argv[1], 'openvino', 1)
second = open_model(sys.argv[1], 'openvino', 1)
del first
del second
memory = [bytearray(1 << 20) for _ in range(64)]  # where what they freed may lie
signal.signal(signal.SIGTERM, lambda *args: print('heard'))
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_are_heard_after_openvino_was_used(tmp_path):
    """Its plugin sets the stack for signals, and must not leave one that is freed."""
    path = tmp_path / 'model.onnx'
    write_plain_onnx(raw_graph(torch.nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 8, 8), path)
    command = [sys.executable, '-c', SIGNALLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, 'heard\n'), done.stderr


def test_the_runtime_of_a_file_does_not_hang_on_imports(tmp_path):
    path = tmp_path / 'model.onnx'
    write_plain_onnx(raw_graph(torch.nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 8, 8), path)
    code = (
        'import sys, mmgfp.runtimes.open_vino\n'
        'from mmgfp.runtimes import open_model\n'
        'print(type(open_model(sys.argv[1])).__name__)\n'
    )
    command = [sys.executable, '-c', code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == 'OnnxRuntime\n', done.stderr
