"""Exported graphs repeat what MMDetection and MMPretrain predict."""

import onnx
import pytest
import torch
from support.exporting import (
    ONE_STAGE,
    TWO_STAGE,
    assert_detections,
    lively_detector,
    onnx_file,
    predictions,
)

from mmgfp.export.graphs import end_to_end_graph
from mmgfp.runtimes import open_model


@pytest.fixture(scope='module', params=[*ONE_STAGE, *TWO_STAGE])
def exported(request, tmp_path_factory):
    """A detector, its predictions, its graph and the file of that."""
    model, image = lively_detector(request.param)
    predicted = predictions(model, image)
    graph = end_to_end_graph(model)
    file = tmp_path_factory.mktemp('onnx') / f'{request.param}.onnx'
    onnx_file(graph, image, file)
    return model, image, predicted, graph, file


def test_graph_detects_as_the_model_predicts(exported):
    _, image, predicted, graph, _ = exported
    with torch.no_grad():
        assert_detections(graph(image), predicted)


def test_file_detects_as_the_model_predicts(exported):
    _, image, predicted, graph, file = exported
    session = open_model(file, threads=1)
    outputs = list(session.run({'image': image.numpy()}).values())
    assert session.outputs == graph.outputs
    assert_detections(outputs, predicted)
    # Free in the number of images.
    outputs = list(session.run({'image': image[1:].numpy()}).values())
    assert_detections(outputs, predicted[1:])


def test_file_has_ops_of_onnx_alone(exported):
    model = onnx.load(exported[-1])
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {''}
    assert [(o.domain, o.version) for o in model.opset_import] == [('', 17)]
