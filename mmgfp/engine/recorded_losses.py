"""Losses of a detector that do not change with what the detector proposes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.recorded_choices import RecordedChoices
from mmgfp.utils.trial_runs import random_states_restored, seed_all, undisturbed


class RecordedLoss:
    """The training loss on one batch, on the same RoIs for every model.

    Args:
        model: The model whose proposals and samples count; it is left as it is.
        data_batch: The batch, before the data preprocessor, which keeps it small.
        seed: Number from which random numbers of each call start.

    Examples:
        >>> from mmgfp.engine.demo_batch import demo_batch
        >>> from mmgfp.engine.model_building import build_model
        >>> from mmengine.hub import get_config
        >>> cfg = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
        >>> model = build_model(cfg)
        >>> loss = RecordedLoss(model, demo_batch(cfg, 1, (64, 64)))
        >>> bool(loss(model) == loss(model))
        True
    """

    def __init__(self, model: Any, data_batch: Any, seed: int = 0) -> None:
        self._data, self._seed = data_batch, seed
        self._choices = RecordedChoices()
        if self._choices.made_by(model):
            with undisturbed(model), torch.no_grad(), self._choices.recording(model):
                model.eval()
                self._loss(model)

    def __call__(self, model: Any) -> Tensor:
        """Return the loss, a scalar.

        Raises:
            ConfigError: If the model makes other choices than the recorded one.
        """
        with self._choices.replaying(model):
            return self._loss(model)

    def _loss(self, model: Any) -> Tensor:
        with random_states_restored(model):
            seed_all(self._seed)
            # Preprocessed for each call: floats take four times the memory.
            return BatchCalls(model, self._data).loss(model)


def recorded_losses(model: Any, batches: Iterable[Any]) -> list[RecordedLoss]:
    """Return the losses of batches as a train dataloader gives them.

    Args:
        model: The original model.
        batches: The batches, before the data preprocessor.
    """
    return [RecordedLoss(model, data, seed) for seed, data in enumerate(batches)]
