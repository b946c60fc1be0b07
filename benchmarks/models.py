"""Models that are measured, each with a batch as its train dataloader gives it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mmgfp.apps.cli import load_config
from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.engine.demo_batch import demo_batch
from mmgfp.engine.model_building import build_model, init_weights

ROOT = Path(__file__).resolve().parent.parent
#: Nothing is frozen, as in the configs that prune: taps on frozen stages would rest.
OPTIONS = {'model.backbone.frozen_stages': -1}
#: Scale of a norm that ends a residual branch, in place of a zero.
BRANCH_SCALE = 0.2


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: As the tables show it.
        config: A config file, or one of an installed library.
        images: Images in a batch N.
        size: Their height and width in pixels.
        shipped: Size (C, H, W) of the image that the exported model is made for.
        options: Entries of the config that are changed.
    """

    name: str
    config: str
    images: int
    size: tuple[int, int]
    shipped: tuple[int, int, int] = (3, 800, 1280)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name with the shape of a batch."""
        height, width = self.size
        return f'{self.name}, {self.images} × {height} × {width}'

    def build(self, device: str) -> tuple[nn.Module, BatchCalls]:
        """The model in training mode, with its calls on a batch."""
        torch.manual_seed(0)
        config = load_config(self.config, {**OPTIONS, **self.options})
        model = build_model(config)
        initialize(model)
        model.to(device)
        batch = demo_batch(config, self.images, self.size)
        return model, BatchCalls(model, batch)


def _retinanet(depth: int, side: int = 256) -> Subject:
    """RetinaNet on two images of ``side`` pixels a side."""
    config = f'mmdet::retinanet/retinanet_r{depth}_fpn_1x_coco.py'
    return Subject(f'RetinaNet R{depth}-FPN', config, 2, (side, side))


SUBJECTS = {
    'retinanet': _retinanet(50),
    'retinanet-r18': _retinanet(18),
    'retinanet-r101': _retinanet(101),
    'retinanet-384': _retinanet(50, 384),
    'retinanet-512': _retinanet(50, 512),
    'faster-rcnn': Subject(
        'Faster R-CNN R50-FPN',
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        2,
        (256, 256),
    ),
    'resnet50': Subject(
        'ResNet-50',
        'mmpretrain::resnet/resnet50_8xb32_in1k.py',
        16,
        (128, 128),
        shipped=(3, 224, 224),
    ),
    'mobilenet-v2': Subject(
        'MobileNetV2',
        'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
        16,
        (128, 128),
        shipped=(3, 224, 224),
    ),
    'retinanet-mobilenet-v2': Subject(
        'RetinaNet MobileNetV2-FPN slim',
        str(ROOT / 'configs/bccd/retinanet_mobilenetv2_fpn_bccd.py'),
        2,
        (256, 320),
        shipped=(3, 256, 320),
        options={'model.backbone.init_cfg': None},
    ),
}


@torch.no_grad()
def initialize(model: Any) -> None:
    """Give weights the first values of their config, but let all branches take part.

    Residual branches that a norm scales by zero get no gradient at first: all of their
    units would look useless.
    """
    init_weights(model)
    for module in model.modules():
        weight = getattr(module, 'weight', None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.any():
            weight.fill_(BRANCH_SCALE)


def sgd(model: nn.Module, lr: float = 0.0) -> Optimizer:
    """SGD as the configs have it.

    A rate of zero does all the work and lets the model stay as it is.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def train_step(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    optimizer: Optimizer | None = None,
) -> Callable[[], None]:
    """One iteration of training, with `sgd` at a rate of zero by default."""
    updates = optimizer or sgd(model)

    def step() -> None:
        updates.zero_grad()
        loss(model).backward()
        updates.step()

    return step


def seeded(work: Callable[[], None]) -> Callable[[], None]:
    """The same random choices each time: all steps sample the same RoIs."""

    def run() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        work()

    return run
