"""Raw outputs of a model that do not change with what it proposes."""

from __future__ import annotations

from typing import Any

import torch

from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.recorded_choices import RecordedChoices
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import (
    is_out_of_memory,
    random_states_restored,
    seed_all,
    undisturbed,
)

#: Methods by which a detector chooses RoIs when it gives raw outputs: proposals, and
#: boxes that a stage hands on to the next one.
CHOICES = ('predict_by_feat', 'regress_by_class')
#: MMDetection gives raw masks of so many RoIs of a batch, the first ones.
MASK_ROIS = 100


class RecordedOutputs:
    """All outputs before post-processing on one batch, on the same RoIs for all models.

    They need no annotations. Those of a two-stage detector are of the RPN, and of its
    heads on what the recorded model proposes.

    Args:
        model: The model whose proposals count; it is left as it is.
        data_batch: The batch, before the data preprocessor, which keeps it small.
        seed: Number from which random numbers of each call start.

    Raises:
        ConfigError: If the model gives no raw outputs.

    Examples:
        >>> from mmgfp.engine.demo_batch import demo_batch
        >>> from mmgfp.engine.model_building import build_model
        >>> from mmengine.hub import get_config
        >>> cfg = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
        >>> model = build_model(cfg)
        >>> outputs = RecordedOutputs(model, demo_batch(cfg, 1, (64, 64)))
        >>> (scores, boxes), proposals = outputs(model)
        >>> scores[0].shape
        torch.Size([1, 720, 8, 8])
    """

    def __init__(self, model: Any, data_batch: Any, seed: int = 0) -> None:
        self._data, self._seed = data_batch, seed
        most = None
        if getattr(getattr(model, 'roi_head', None), 'with_mask', False):
            images = BatchCalls(model, data_batch, training=False).images
            most = max(MASK_ROIS // images, 1)  # else masks would be of one image alone
        self._choices = RecordedChoices(CHOICES, most)
        if self._choices.made_by(model):
            with undisturbed(model), torch.no_grad(), self._choices.recording(model):
                self._outputs(model)

    def __call__(self, model: Any) -> tuple[Any, list[Any]]:
        """Return the outputs, and those of the RPN where there is one.

        Raises:
            ConfigError: If the model gives no raw outputs, or makes other choices than
                the recorded one.
        """
        seen: list[Any] = []
        with self._choices.replaying(model, seen):
            return self._outputs(model), seen

    def _outputs(self, model: Any) -> Any:
        with random_states_restored(model):
            seed_all(self._seed)
            # Preprocessed for each call: floats take four times the memory.
            data = BatchCalls(model, self._data, training=False).data
            model.eval()
            try:
                return model(**data, mode='tensor')
            except Exception as error:  # models that cannot have errors of their own
                if is_out_of_memory(error) or isinstance(error, ConfigError):
                    raise
                raise ConfigError(
                    type(model).__name__,
                    "a model that gives raw outputs, in mode='tensor'",
                    f'{type(error).__name__}: {" ".join(str(error).split())[:200]}',
                    'score it by the loss, with annotations',
                ) from error
