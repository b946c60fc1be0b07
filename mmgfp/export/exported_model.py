"""Exported files in the place of a model, to be tested by MMEngine's runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor

from mmgfp.export.fitting import pad_to
from mmgfp.export.masks import pasted_masks
from mmgfp.export.metadata import KEY
from mmgfp.runtimes import Session
from mmgfp.utils.errors import ConfigError


class ExportedModel(BaseModel):
    """A file that gives results, in the place of the model it was exported from.

    Args:
        session: The file; it gives ``dets`` and ``labels``, and ``masks`` for instance
            segmentation, or ``scores``.
        model: The model as its config builds it; its weights are not used, but its data
            preprocessor and its test settings.

    Raises:
        ConfigError: If the file gives other outputs, reads other things than an image
            as the data preprocessor gives it, or belongs to other classes.
    """

    def __init__(self, session: Session, model: Any) -> None:
        super().__init__(data_preprocessor=model.data_preprocessor)
        self.session = session
        self.meta = json.loads(session.metadata.get(KEY, '{}'))
        _check_outputs(session, self.meta)
        if len(session.inputs) != 1:
            got = f'{len(session.inputs)} inputs'
            remedy = 'give a file that tools/export.py wrote'
            raise ConfigError('the file', 'one that reads an image', got, remedy)
        ((self.input, self.size),) = session.inputs.items()
        if self.meta.get('preprocess'):
            raise ConfigError(
                'the file',
                'one that reads images as the data preprocessor gives them',
                'one that prepares them itself',
                'export it without --preprocess to test it',
            )
        processor: Any = model.data_preprocessor
        pad = getattr(processor, 'pad_value', 0) or 0
        self.pad_value = self.meta.get('pad_value', pad)
        rcnn = (getattr(model, 'test_cfg', None) or {}).get('rcnn') or {}
        self.mask_threshold = rcnn.get('mask_thr_binary', 0.5)

    def forward(self, inputs: Tensor, data_samples: Any = None, **_: Any) -> Any:
        """Return the samples with the predictions of the file.

        Args:
            inputs: (N, C, H, W) as the data preprocessor gives it.
            data_samples: One of each image.
        """
        classifies = 'scores' in self.session.outputs
        size = self.size[2:]
        if classifies:
            _check_whole(inputs, size)
        outputs = self._run(pad_to(inputs, size, self.pad_value))
        for i, sample in enumerate(data_samples):
            own = {name: torch.from_numpy(v[i]) for name, v in outputs.items()}
            if classifies:
                scores = own['scores'].float()
                sample.set_pred_score(scores).set_pred_label(scores.argmax())
            else:
                sample.pred_instances = self._instances(own, sample.metainfo)
        return data_samples

    def _run(self, images: Tensor) -> dict[str, np.ndarray]:
        """Run in batches of the size that the file fixes."""
        array = images.cpu().float().numpy()
        step = self.size[0] or len(array)
        parts = []
        for start in range(0, len(array), step):
            batch = array[start : start + step]
            # A last batch that is too small is filled up; what that gives is dropped.
            filled = np.resize(batch, (step, *batch.shape[1:]))
            outputs = self.session.run({self.input: filled})
            parts.append({k: v[: len(batch)] for k, v in outputs.items()})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    def _instances(
        self, outputs: dict[str, Tensor], meta: dict[str, Any]
    ) -> InstanceData:
        """Turn the detections of an image into those of the image before resizing."""
        found = outputs['labels'] >= 0
        dets = outputs['dets'][found].float()  # (K, 5)
        height, width = meta['img_shape'][:2]
        # The file takes the padding for a part of the image.
        boxes = dets[:, :4].minimum(dets.new_tensor([width, height] * 2)).clamp(min=0)
        boxes = boxes / dets.new_tensor(meta.get('scale_factor', (1, 1))).repeat(2)
        instances = InstanceData(
            bboxes=boxes, scores=dets[:, 4], labels=outputs['labels'][found]
        )
        if 'masks' in outputs:
            masks = outputs['masks'][found].float()
            instances.masks = pasted_masks(
                masks, boxes, meta['ori_shape'], self.mask_threshold
            )
        return instances


def _check_outputs(session: Session, meta: dict[str, Any]) -> None:
    names = set(session.outputs)
    if not ({'dets', 'labels'} <= names or 'scores' in names):
        raise ConfigError(
            'the file',
            'one whose outputs are dets and labels, or scores',
            f'{meta.get("outputs", "outputs")}: {", ".join(sorted(names))[:100]}',
            'export it with --nms',
        )


def _check_whole(images: Tensor, size: Sequence[int | None]) -> None:
    """Refuse images for classification that would be padded."""
    sides = tuple(images.shape[2:])
    if any(s not in (None, n) for s, n in zip(size, sides, strict=True)):
        raise ConfigError(
            'images of the test pipeline',
            f'of size {tuple(size)}, which the file fixes',
            str(sides),
            'export the file for that size',
        )
