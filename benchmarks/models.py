"""Models that are measured, each with a batch as its train dataloader gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmgfp.cli import load_config
from mmgfp.engine.demo_batch import build_model, demo_batch
from mmgfp.engine.inputs import BatchCalls


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: As the tables show it.
        config: A config file, or one of an installed library.
        images: Images in a batch N.
        size: Their height and width in pixels.
    """

    name: str
    config: str
    images: int
    size: tuple[int, int]

    @property
    def label(self) -> str:
        """The name with the shape of a batch."""
        height, width = self.size
        return f'{self.name}, {self.images} × {height} × {width}'

    def build(self, device: str) -> tuple[nn.Module, BatchCalls]:
        """The model in training mode, with its calls on a batch."""
        torch.manual_seed(0)
        config = load_config(self.config)
        model = build_model(config).to(device)
        return model, BatchCalls(model, self._batch(config))

    def _batch(self, config: Config) -> Any:
        return demo_batch(config, self.images, self.size)


SUBJECTS = {
    'retinanet': Subject(
        'RetinaNet R50-FPN',
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        2,
        (256, 256),
    ),
    'faster-rcnn': Subject(
        'Faster R-CNN R50-FPN',
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        2,
        (256, 256),
    ),
    'resnet50': Subject(
        'ResNet-50', 'mmpretrain::resnet/resnet50_8xb32_in1k.py', 16, (128, 128)
    ),
}


def train_step(
    model: nn.Module, loss: Callable[[nn.Module], Tensor]
) -> Callable[[], None]:
    """One iteration of training with SGD, as the configs have it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A rate of zero does all the work and lets the model stay as it is.
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step
