"""Export of a model to files, each checked before it is there."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmgfp.engine.config_search import scope_of, testing_pipeline
from mmgfp.engine.deploy import Trained
from mmgfp.export.calibration import CalibrationImages, evenly
from mmgfp.export.check import Reference, Report, check_file
from mmgfp.export.graphs import end_to_end_graph, raw_graph
from mmgfp.export.images import Sample, find_images, read_samples
from mmgfp.export.int8 import check_int8, write_int8
from mmgfp.export.matching import Limits
from mmgfp.export.metadata import metadata_of, task_of
from mmgfp.export.onnx_file import write_onnx
from mmgfp.export.openvino_file import write_openvino
from mmgfp.export.options import ExportOptions
from mmgfp.export.preprocess import (
    Preprocessing,
    WithPreprocessing,
    check_can_resize,
    preprocessing_of,
)
from mmgfp.export.torchscript_file import write_torchscript
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.io import check_folder
from mmgfp.utils.steps import begin_step

#: Formats by name: what files end in, and what runs them.
FORMATS = {
    'onnx': ('.onnx', 'onnxruntime'),
    'openvino': ('.xml', 'openvino'),
    'torchscript': ('.pt', 'torchscript'),
}
#: Printed where files without results are written.
RAW_NOTE = (
    'the outputs are raw: what the heads give, or the RPN of a two-stage detector; '
    '--nms gives detections or probabilities'
)


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file.
        report: What its check saw; None of an 8-bit file, which is not checked.
        images: How many images it was checked or calibrated on, and where they came
            from.
    """

    path: Path
    report: Report | None
    images: str

    @property
    def megabytes(self) -> float:
        """Size of the file, in MB of 10^6 bytes, with the weights beside it."""
        files = {self.path, self.path.with_suffix('.bin')}
        files = {self.path} if self.path.suffix != '.xml' else files
        return sum(file.stat().st_size for file in files) / 1e6

    def __str__(self) -> str:
        head = f'{self.path} ({self.megabytes:.2f} MB)'
        if self.report is None:
            return f'{head}: 8 bits, {self.images}; not checked against the model'
        return f'{head}: checked in {self.report} ({self.images})'


def check_formats(formats: Sequence[str], options: ExportOptions) -> None:
    """Check that formats are known and can do what is asked for.

    Raises:
        ConfigError: If one is unknown, or has no half precision or no 8 bits.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        got = ', '.join(unknown) or 'none'
        raise ConfigError(
            'the format', f'one of {", ".join(FORMATS)}', got, 'name one of these'
        )
    if options.fp16 and 'torchscript' in formats:
        raise ConfigError(
            '--fp16',
            'left out for torchscript',
            'both',
            'TorchScript files run in single precision on a CPU: export onnx or '
            'openvino',
        )
    if options.calibrate:
        check_int8(formats, options)


def export_files(
    cfg: Config,
    trained: Trained,
    shape: Sequence[int],
    out: Path,
    name: str,
    formats: Sequence[str],
    options: ExportOptions,
    images: Sequence[Path] = (),
) -> list[Exported]:
    """Write a model in several formats, and check each in its runtime.

    Args:
        cfg: The model's config.
        trained: The model.
        shape: (C, H, W) of the input.
        out: The folder to write to.
        name: Name of the files without suffix.
        formats: Names in `FORMATS`.
        options: What leaves the file, which axes are free, and so on.
        images: Files and folders with images for the check, and to calibrate 8-bit
            files; by default some of the test dataset, and of the training dataset.

    Raises:
        ConfigError: If the model or the options cannot be exported, or a runtime is
            not installed.
        ExportError: If a file does not do what the model does. No file is left then.
    """
    check_formats(formats, options)
    reference = _reference(cfg, trained, shape, options)
    init_default_scope(scope_of(cfg) or 'mmengine')
    prep = preprocessing_of(cfg, trained.model, shape, testing_pipeline(cfg))
    infos, origin = find_images(cfg, images, prep)
    samples = tuple(read_samples(cfg, trained.model, infos, prep, options))
    metadata = metadata_of(cfg, trained, prep, options)
    graph = reference.graph
    if options.preprocess:
        graph = WithPreprocessing(graph, prep)
    reference = replace(reference, samples=samples, graph=graph)
    example = torch.from_numpy(samples[0].image)[None]
    if not options.preprocess:
        example = samples[0].inputs
    calibration = _calibration(cfg, trained, shape, prep, options, samples, images)
    work = Work(reference, example, options, metadata, origin, calibration)
    return _write_all(out, name, formats, work)


def _calibration(
    cfg: Config,
    trained: Trained,
    shape: Sequence[int],
    prep: Preprocessing,
    options: ExportOptions,
    samples: Sequence[Sample],
    images: Sequence[Path],
) -> Sequence[np.ndarray]:
    """Return inputs to calibrate on: the user's images, or those of the config."""
    if not options.calibrate:
        return ()
    if images:
        chosen = evenly(samples, options.calibrate)
        return [sample.inputs.float().cpu().numpy() for sample in chosen]
    size = (None, None) if 'size' in options.dynamic else shape[1:]
    return CalibrationImages(
        cfg, trained.model, options.calibrate, size, prep.pad_value
    )


@dataclass(frozen=True)
class Work:
    """Inputs and options that all files of a call share.

    Attributes:
        reference: The graph to write, and what it is compared with.
        example: An input of the size to export.
        options: What leaves the file, which axes are free, and so on.
        metadata: Texts to store, by key.
        origin: Where the images of the check came from.
        calibration: Inputs (1, C, H, W) for 8-bit files; none where there are none.
    """

    reference: Reference
    example: Tensor
    options: ExportOptions
    metadata: dict[str, str]
    origin: str
    calibration: Sequence[np.ndarray]


def _write_all(
    out: Path, name: str, formats: Sequence[str], work: Work
) -> list[Exported]:
    """Write and check all files in a hidden folder, then move them to ``out``."""
    is_new = not out.exists()
    check_folder(out)
    written, small_files = [], []
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix='.export.') as tmp:
            for kind in formats:
                suffix, runtime = FORMATS[kind]
                path = Path(tmp, f'{name}{suffix}')
                graph = work.reference.graph
                begin_step(f'writing {kind}')
                _write(kind, path, graph, work.example, work.options, work.metadata)
                begin_step(f'checking {kind} against the model')
                report = check_file(path, runtime, work.reference, work.options)
                written.append(Exported(out / path.name, report, work.origin))
                if work.calibration:
                    begin_step(f'calibrating {kind} with 8 bits')
                    small = write_int8(path, work.calibration)
                    note = f'calibrated on {len(work.calibration)} images'
                    small_files.append(Exported(out / small.name, None, note))
            # All of them or none.
            for file in sorted(Path(tmp).iterdir()):
                if file.suffix not in _UNWANTED:
                    file.chmod(0o644)
                    file.replace(out / file.name)
    finally:
        if is_new and not any(out.iterdir()):
            out.rmdir()
    return written + small_files


#: What is written on the way to another format.
_UNWANTED = ('.tmp',)


def _write(
    kind: str,
    path: Path,
    graph: nn.Module,
    example: Tensor,
    options: ExportOptions,
    metadata: dict[str, str],
) -> None:
    # A copy, as an exporter may leave traces in a module that reach the next file.
    graph = copy.deepcopy(graph)
    if kind == 'torchscript':
        write_torchscript(path, graph, example, options, metadata)
    elif kind == 'onnx':
        write_onnx(path, graph, example, options, metadata)
    else:
        between = path.with_suffix('.tmp')
        write_onnx(between, graph, example, replace(options, fp16=False), metadata)
        write_openvino(path, between, options, metadata)


def _reference(
    cfg: Config, trained: Trained, shape: Sequence[int], options: ExportOptions
) -> Reference:
    model: Any = trained.model
    task = task_of(cfg, model)
    if options.preprocess:
        check_can_resize(testing_pipeline(cfg))
    if options.nms and task != 'classification' and 'size' in options.dynamic:
        raise ConfigError(
            '--dynamic size',
            'left out with --nms',
            'both',
            'priors and limits of boxes are computed for one size of images: leave '
            'either out',
        )
    if options.nms and options.dynamo and task != 'classification':
        _check_fixed_batch(options)
    # A copy, so that nothing done to the graph reaches what it is compared with.
    twin = copy.deepcopy(model)
    if options.nms:
        graph = end_to_end_graph(twin)
    else:
        graph = raw_graph(twin, torch.zeros(1, *shape))
    limits = _limits(model) if options.nms and task != 'classification' else None
    return Reference(model, graph, (), task, limits)


def _check_fixed_batch(options: ExportOptions) -> None:
    """Refuse a free batch where `torch.export` fixes it without a word."""
    if 'batch' in options.dynamic:
        raise ConfigError(
            '--dynamic batch',
            'left out with --dynamo and --nms',
            'all three',
            'torch.export fixes the number of images in the NMS of detectors: leave '
            '--dynamo out',
        )


def _limits(model: Any) -> Limits:
    head = model.roi_head if hasattr(model, 'roi_head') else model.bbox_head
    test_cfg = head.test_cfg
    nms = test_cfg.get('nms') or {}
    iou = nms.get('iou_threshold', nms.get('iou_thr', 1.0))
    count = test_cfg.get('max_per_img', -1)
    return Limits(
        float(test_cfg.get('score_thr', 0.0)),
        float(iou),
        count if count > 0 else 10**9,
    )
