"""Models as modules of tensors alone, to be exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.export.heads.support import inherits, refuse
from mmgfp.utils.errors import ConfigError

Outputs = tuple[Tensor, ...]
#: Layers of mmcv that run compiled code of its own, and those derived from them.
COMPILED = {'DeformConv2d', 'ModulatedDeformConv2d', 'CARAFE', 'MaskedConv2d'}


class ExportGraph(nn.Module):
    """A model that takes images and gives a fixed number of tensors.

    Args:
        model: The model; it is put into eval mode.
        outputs: Names of the outputs.
        steps: From the model and images to the outputs.

    Attributes:
        outputs: Names of the outputs, in order.

    Raises:
        ConfigError: If the model has a layer that no runtime has.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: tuple[str, ...],
        steps: Callable[[Any, Tensor], Outputs],
    ) -> None:
        super().__init__()
        _check_layers(model)
        self.model = model
        self.outputs = outputs
        self.steps = steps
        self.eval()

    def forward(self, image: Tensor) -> Outputs:
        """Return the outputs.

        Args:
            image: Images (N, C, H, W), resized, padded and normalised as the model's
                data preprocessor leaves them.
        """
        return self.steps(self.model, image)


def raw_graph(model: Any, image: Tensor | None = None) -> ExportGraph:
    """Return a graph of the model's outputs before any post-processing.

    Of two-stage detectors these are the outputs of the RPN: what comes after it needs
    proposals. An output is named after its place, ``output_1_0`` being the first level
    of the second list.

    Args:
        model: A model of MMDetection or MMPretrain; it is put into eval mode.
        image: Images (N, C, H, W) on which the model runs once, for the number of
            outputs; a small one by default.

    Examples:
        >>> graph = raw_graph(nn.Conv2d(3, 2, 1))
        >>> graph.outputs, [tuple(o.shape) for o in graph(torch.zeros(1, 3, 8, 8))]
        (('output',), [(1, 2, 8, 8)])
    """
    model.eval()
    if image is None:
        image = next(model.parameters()).new_zeros(1, 3, 128, 128)
    with torch.no_grad():
        names = tuple(name for name, _ in _named_tensors(_raw(model, image)))
    return ExportGraph(model, names, _raw_outputs)


def end_to_end_graph(model: Any) -> ExportGraph:
    """Return a graph that gives results as the model predicts them.

    Detectors give ``dets`` (N, K, 5) as x1, y1, x2, y2 in pixels of the input and a
    score, best first, and ``labels`` (N, K). K is ``test_cfg.max_per_img``; the places
    of missing detections hold zeros, with label -1. Instance segmentation also gives
    ``masks`` (N, K, h, w), probabilities inside of the boxes. Classifiers give
    ``scores`` (N, classes).

    Args:
        model: A model of MMDetection or MMPretrain; it is put into eval mode.

    Raises:
        ConfigError: If the results of its head cannot be repeated by a graph.
    """
    if hasattr(model, 'roi_head'):
        return _two_stage_graph(model)
    if hasattr(model, 'bbox_head'):
        return _one_stage_graph(model)
    return _classification_graph(model)


def _one_stage_graph(model: Any) -> ExportGraph:
    from mmdet.models.detectors import SingleStageDetector

    from mmgfp.export.heads.dense import check_dense

    if not inherits(model, SingleStageDetector, 'predict'):
        kinds = 'a one-stage detector, or a two-stage one with RPN'
        raise refuse('model', kinds, type(model).__name__)
    check_dense(model.bbox_head)
    return ExportGraph(model, ('dets', 'labels'), _one_stage)


def _two_stage_graph(model: Any) -> ExportGraph:
    from mmdet.models.detectors import TwoStageDetector

    from mmgfp.export.heads.two_stage import check_two_stage

    if not inherits(model, TwoStageDetector, 'predict') or not model.with_rpn:
        raise refuse('model', 'a two-stage detector with RPN', type(model).__name__)
    check_two_stage(model)
    masks = ('masks',) if model.roi_head.with_mask else ()
    return ExportGraph(model, ('dets', 'labels', *masks), _two_stage)


def _classification_graph(model: Any) -> ExportGraph:
    from mmpretrain.models.classifiers import ImageClassifier
    from mmpretrain.models.heads import ClsHead

    if not inherits(model, ImageClassifier, 'predict'):
        expected = 'a detector or an image classifier'
        raise refuse('model', expected, type(model).__name__)
    if not inherits(model.head, ClsHead, 'predict', '_get_predictions'):
        expected = 'one that predicts by softmax'
        raise refuse('head', expected, type(model.head).__name__)
    return ExportGraph(model, ('scores',), _classification)


def _one_stage(model: Any, image: Tensor) -> Outputs:
    from mmgfp.export.heads.dense import detect

    outputs = model.bbox_head(model.extract_feat(image))
    return _packed(detect(model.bbox_head, outputs, _size(image)))


def _two_stage(model: Any, image: Tensor) -> Outputs:
    from mmgfp.export.heads.dense import propose
    from mmgfp.export.heads.two_stage import classify, segment

    size = _size(image)
    features = model.extract_feat(image)
    proposals = propose(model.rpn_head, model.rpn_head(features), size)
    detections = classify(model.roi_head, features, proposals, size)
    if not model.roi_head.with_mask:
        return _packed(detections)
    masks = segment(model.roi_head, features, detections)
    return *_packed(detections), masks


def _classification(model: Any, image: Tensor) -> Outputs:
    return (model(image).softmax(1),)


def _packed(detections: Any) -> Outputs:
    boxes, scores, labels = detections
    return torch.cat([boxes, scores[..., None]], -1), labels


def _check_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        bases = [c for c in type(module).__mro__ if c.__module__.startswith('mmcv.ops')]
        if any(c.__name__ in COMPILED for c in bases):
            raise ConfigError(
                'model',
                'made of layers that other runtimes have',
                f'{type(module).__name__} of mmcv at {name}',
                'replace this layer',
            )


def _size(image: Tensor) -> tuple[int, int]:
    from mmgfp.export.heads.candidates import static

    return static(image.shape[2]), static(image.shape[3])


def _raw_outputs(model: Any, image: Tensor) -> Outputs:
    return tuple(tensor for _, tensor in _named_tensors(_raw(model, image)))


def _raw(model: Any, image: Tensor) -> Any:
    rpn = getattr(model, 'rpn_head', None)
    if isinstance(rpn, nn.Module):
        return rpn(model.extract_feat(image))
    return model(image)


def _named_tensors(tree: Any, name: str = 'output') -> Iterator[tuple[str, Tensor]]:
    """Return tensors in dicts, lists and tuples with names that say where."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named_tensors(value, f'{name}_{key}')
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _named_tensors(value, f'{name}_{number}')
