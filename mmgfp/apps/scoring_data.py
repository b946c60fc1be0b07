"""What units are scored by, and layers refitted to: losses on training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from mmgfp.apps.refitting_data import LEAST_BATCHES, refitting_batches
from mmgfp.apps.run_config import seed_of
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch, image_channels
from mmgfp.engine.recorded_losses import RecordedLoss, recorded_losses
from mmgfp.engine.recorded_outputs import RecordedOutputs
from mmgfp.output_losses import output_losses
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import LossFunction


@dataclass(frozen=True)
class ScoringData:
    """Losses that a model is scored and refitted by, and what goes with them.

    Attributes:
        losses: A loss for each batch.
        tracing_loss: The training loss by which coupled channels are found.
        calls: The calls of the batch of the tracing loss.
        shape: Size (C, H, W) of an image.
    """

    losses: Sequence[LossFunction]
    tracing_loss: LossFunction
    calls: BatchCalls
    shape: Sequence[int]


def with_labels(
    cfg: Config,
    model: Any,
    images: int,
    batch_size: int | None,
    least: int = LEAST_BATCHES,
) -> ScoringData:
    """Return the training losses on annotated images.

    Args:
        cfg: The config of the model.
        model: The model.
        images: Images to draw.
        batch_size: Images of a batch; that of the config if None.
        least: Batches that are needed.

    Raises:
        ConfigError: If there are too few, or none.
    """
    drawn = refitting_batches(cfg, images, batch_size, seed_of(cfg), least=least)
    batches = _annotated(model, drawn, least)
    losses = recorded_losses(model, batches)
    calls = BatchCalls(model, batches[0])
    return ScoringData(losses, losses[0], calls, _shape_of(calls))


def without_labels(
    cfg: Config,
    model: Any,
    images: int,
    batch_size: int | None,
    least: int = LEAST_BATCHES,
) -> ScoringData:
    """Return the distances to the model's own outputs, on images without labels.

    Coupled channels are found by the training loss on a batch that is made up: what
    runs in training alone is pruned along with the rest.

    Args:
        cfg: The config of the model.
        model: The model.
        images: Images to draw.
        batch_size: Images of a batch; that of the config if None.
        least: Batches that are needed.

    Raises:
        ConfigError: If there are too few, or none, or the model has no raw outputs.
    """
    seed = seed_of(cfg)
    batches = refitting_batches(cfg, images, batch_size, seed, False, least)
    forwards = [RecordedOutputs(model, data, i) for i, data in enumerate(batches)]
    losses = output_losses(model, forwards, seed)
    made_up = demo_batch(cfg, channels=image_channels(cfg, model))
    calls = BatchCalls(model, made_up)
    shape = _shape_of(BatchCalls(model, batches[0], training=False))
    return ScoringData(losses, RecordedLoss(model, made_up), calls, shape)


def _shape_of(calls: BatchCalls) -> Sequence[int]:
    """Return the size (C, H, W) of an image of a batch."""
    return calls.size or calls.data['inputs'][0].shape[1:]


def _annotated(model: Any, batches: Sequence[Any], least: int) -> list[Any]:
    """Return the batches on which something is annotated.

    Raises:
        ConfigError: If these are fewer than needed.
    """
    chosen = [data for data in batches if not BatchCalls(model, data).without_boxes]
    if len(chosen) < least:
        raise ConfigError(
            'train_dataloader',
            f'with at least {least} batches of images that have boxes',
            f'{len(chosen)} of {len(batches)}',
            'raise --images, look at the annotations, or do without: --label-free',
        )
    return chosen
