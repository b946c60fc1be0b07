"""An exported file, compared in its runtime with the model's own predictions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmgfp.export.images import Sample
from mmgfp.export.masks import pasted_masks
from mmgfp.export.matching import Detections, Limits, Tolerance, match
from mmgfp.export.options import INPUT, ExportOptions
from mmgfp.export.preprocess import WithPreprocessing
from mmgfp.runtimes import open_model
from mmgfp.utils.errors import MMGFPError
from mmgfp.utils.words import counted

#: Least share of the model's detections that a file must have, rounding or not.
MATCHED = 0.8
#: Of weights and products in half precision.
HALF = Tolerance(box=1.0, score=1e-2, mask=0.1)


class ExportError(MMGFPError, RuntimeError):
    """An exported file does not do what the model does."""


@dataclass(frozen=True)
class Report:
    """Outcome of the comparison of a file with its model.

    Attributes:
        runtime: What ran the file.
        images: Number of images.
        detections: Detections that both have; None if others outputs were compared.
        borderline: Detections of one side alone that rounding decides about.
        box: Largest difference of boxes in pixels.
        score: Largest difference of scores, or of raw outputs relative to the largest.
        mask: Largest share of differing pixels of a mask.
        levels: Largest difference of pixels that the file resized itself, in grey
            levels; None if it does not.
    """

    runtime: str
    images: int
    detections: int | None = None
    borderline: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    levels: float | None = None

    def __str__(self) -> str:
        images = counted(self.images, 'image')
        if self.detections is None:
            text = f'{images}, outputs within {self.score:.1e}'
        else:
            text = (
                f'{images}, {self.detections} detections matched, boxes within '
                f'{self.box:.1e} px, scores within {self.score:.1e}'
            )
            text += f', masks within {self.mask:.1%}' if self.mask else ''
            text += f', {self.borderline} decided by rounding'
        if self.levels is not None:
            text += f', pixels within {self.levels:.1f} grey levels'
        return f'{self.runtime}: {text}'


@dataclass(frozen=True)
class Reference:
    """A model and what it predicts on images.

    Attributes:
        model: The model as the library made it.
        graph: The graph that was exported; a `WithPreprocessing` prepares images.
        samples: The images.
        task: 'detection', 'instance' or 'classification'.
        limits: What the detector keeps; None for classifiers.
    """

    model: Any
    graph: nn.Module
    samples: Sequence[Sample]
    task: str
    limits: Limits | None


@torch.inference_mode()
def check_file(
    path: Path, runtime: str, reference: Reference, options: ExportOptions
) -> Report:
    """Compare a file with the model on all images.

    Args:
        path: The file.
        runtime: What opens it.
        reference: What is expected.
        options: With which it was exported.

    Raises:
        ExportError: If they differ by more than the tolerance, or no detection could be
            compared.
    """
    tolerance = HALF if options.fp16 else Tolerance()
    session = open_model(path, runtime)
    report = Report(runtime, len(reference.samples))
    for feed, sample in _feeds(reference, options):
        found = session.run({INPUT: feed.numpy()})
        prepared, step = sample.inputs, torch.ones(2)
        if isinstance(reference.graph, WithPreprocessing):
            prepared, step = reference.graph.prepare(feed)
            levels = _levels(reference.graph, prepared, sample)
            report = replace(report, levels=max(report.levels or 0.0, levels))
        seen = replace(sample, inputs=prepared)
        if options.nms and reference.task != 'classification':
            report = _detections(report, found, seen, step, reference, tolerance, path)
        else:
            report = _values(report, found, seen, reference, options, tolerance, path)
    if report.detections == 0:
        raise ExportError(
            f'the images to compare {path.name} on',
            'some on which the model detects something',
            f'{report.images} without',
            'give others by --images, or lower score_thr of model.test_cfg',
        )
    return report


def _feeds(
    reference: Reference, options: ExportOptions
) -> Iterator[tuple[Tensor, Sample]]:
    """Yield what a file is called with, and the image it stands for.

    Where the batch is free, a batch of all images of one size is compared as well.
    """
    for sample in reference.samples:
        if options.preprocess:
            yield torch.from_numpy(sample.image)[None], sample
        else:
            yield sample.inputs, sample
    if 'batch' in options.dynamic:
        size = reference.samples[0].inputs.shape
        alike = [s for s in reference.samples if s.inputs.shape == size] * 2
        inputs = torch.cat([s.inputs for s in alike])
        infos = [d for s in alike for d in s.data_samples]
        together = replace(alike[0], inputs=inputs, data_samples=infos)
        yield inputs, together


def _levels(graph: WithPreprocessing, prepared: Tensor, sample: Sample) -> float:
    """Return the difference of two prepared images in grey levels.

    Raises:
        ExportError: If it is more than rounding of bilinear resizing explains.
    """
    levels = ((prepared - sample.inputs) * graph.std).abs().max().item()
    if not levels <= 1.01:
        raise ExportError(
            f'{sample.name} as the file prepares it',
            "within one grey level of the config's pipeline",
            f'{levels:.1f} levels apart',
            'leave --preprocess out and prepare images outside of the file',
        )
    return levels


def _detections(
    report: Report,
    found: dict[str, np.ndarray],
    sample: Sample,
    step: Tensor,
    reference: Reference,
    tolerance: Tolerance,
    path: Path,
) -> Report:
    assert reference.limits is not None
    data = copy.deepcopy(sample.data_samples)
    expected = reference.model(sample.inputs, data, mode='predict')
    for i, output in enumerate(expected):
        instances = output.pred_instances
        masks = instances.masks if reference.task == 'instance' else None
        ours = Detections(
            instances.bboxes.numpy(),
            instances.scores.numpy(),
            instances.labels.numpy(),
            None if masks is None else np.asarray(masks, dtype=bool),
        )
        theirs = _found(found, i, step, reference.model, sample.inputs.shape[-2:])
        result = match(ours, theirs, reference.limits, tolerance)
        few = len(result.pairs) < MATCHED * len(ours.scores)
        if few or result.missing or result.extra or result.mask > tolerance.mask:
            raise ExportError(_difference(ours, theirs, result, path, sample.name))
        report = replace(
            report,
            detections=(report.detections or 0) + len(result.pairs),
            borderline=report.borderline + result.borderline,
            box=max(report.box, result.box),
            score=max(report.score, result.score),
            mask=max(report.mask, result.mask),
        )
    return replace(report, detections=report.detections or 0)


def _found(
    found: dict[str, np.ndarray], i: int, step: Tensor, model: Any, size: Sequence[int]
) -> Detections:
    """Return the detections of a file in pixels of the model's input."""
    is_one = found['labels'][i] >= 0
    boxes, scores = np.split(found['dets'][i][is_one], [4], axis=1)
    boxes = boxes / np.tile(step.numpy(), 2)
    masks = None
    if 'masks' in found:
        masks = pasted_masks(
            torch.from_numpy(found['masks'][i][is_one]).float(),
            torch.from_numpy(boxes).float(),
            size,
            model.roi_head.test_cfg.mask_thr_binary,
        ).numpy()
    return Detections(boxes, scores[:, 0], found['labels'][i][is_one], masks)


def _difference(
    ours: Detections, theirs: Detections, result: Any, path: Path, image: str
) -> str:
    parts = [f'{len(result.pairs)} of {len(ours.scores)} detections matched']
    for name, side, left in (
        ('lacks', ours, result.missing),
        ('adds', theirs, result.extra),
    ):
        if left:
            first = left[0]
            box = ', '.join(f'{v:.2f}' for v in side.boxes[first])
            parts.append(
                f'it {name} {len(left)}, such as class {side.labels[first]} with '
                f'{side.scores[first]:.4f} at ({box})'
            )
    if result.mask:
        parts.append(f'masks differ in up to {result.mask:.1%} of their pixels')
    return (
        f'{path.name} must detect what the model does (got, on {image}, '
        f'{"; ".join(parts)}); it was not written: try another format or --dynamo'
    )


def _values(
    report: Report,
    found: dict[str, np.ndarray],
    sample: Sample,
    reference: Reference,
    options: ExportOptions,
    tolerance: Tolerance,
    path: Path,
) -> Report:
    expected = _expected_values(sample, reference, options)
    worst = report.score
    for (name, value), tensor in zip(found.items(), expected, strict=True):
        wanted = tensor.numpy()
        scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-6)
        same = value.shape == wanted.shape
        apart = np.inf
        if same:
            apart = float(np.abs(value - wanted).max(initial=0.0)) / scale
        if not apart <= tolerance.score:
            got = f'{value.shape} for {wanted.shape}' if not same else f'{apart:.2g}'
            raise ExportError(
                f'{name} of {path.name}',
                f"within {tolerance.score:g} of the model's, relative to the largest",
                f'{got} on {sample.name}',
                'it was not written: try another format or --dynamo',
            )
        worst = max(worst, apart)
    return replace(report, score=worst)


def _expected_values(
    sample: Sample, reference: Reference, options: ExportOptions
) -> list[Tensor]:
    """Return scores of classes by `predict`, or raw outputs, in the graph's order."""
    model = reference.model
    if options.nms:
        data = copy.deepcopy(sample.data_samples)
        outputs = model(sample.inputs, data, mode='predict')
        return [torch.stack([o.pred_score for o in outputs])]
    if hasattr(model, 'rpn_head'):
        return _flat(model.rpn_head(model.extract_feat(sample.inputs)))
    return _flat(model(sample.inputs, mode='tensor'))


def _flat(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [tensor for part in parts for tensor in _flat(part)]
