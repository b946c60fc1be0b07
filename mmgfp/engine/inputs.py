"""How a model of the OpenMMLab kind is called on a training batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.errors import ConfigError


class BatchCalls:
    """The calls that pruning makes on one batch as a train dataloader gives it.

    Args:
        model: The model without a wrapper such as DDP.
        data_batch: The batch, before the data preprocessor; it is left untouched.
    """

    def __init__(self, model: Any, data_batch: Any) -> None:
        self.data = model.data_preprocessor(copy.deepcopy(data_batch), True)
        inputs = self.data['inputs']
        self.images = len(inputs)
        self.size = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None

    def loss(self, model: Any) -> Tensor:
        """The training loss, a scalar."""
        losses = model(**copy.deepcopy(self.data), mode='loss')
        return model.parse_losses(losses)[0]

    def forward(self, model: nn.Module) -> Any:
        """All raw outputs of inference, before post-processing."""
        return model(**copy.deepcopy(self.data), mode='tensor')

    def sized_forward(self, shape: tuple[int, ...]) -> Callable[[nn.Module], Any]:
        """A call on one image of ``shape`` (C, H, W), to count costs with.

        Raises:
            ConfigError: ``shape`` is not (C, H, W) with the model's channels.
        """
        inputs = self.data['inputs']
        if len(shape) != 3 or shape[0] != inputs.shape[1] or min(shape) < 1:
            raise ConfigError(
                'input_shape',
                f'(C, H, W) with C = {inputs.shape[1]}',
                repr(shape),
                'give the size at which the costs shall be counted',
            )
        data = copy.deepcopy({**self.data, 'inputs': inputs[:1]})
        data['inputs'] = inputs.new_zeros(1, *shape)
        samples = data.get('data_samples')
        data['data_samples'] = samples and [_resized(samples[0], shape[1:])]

        def forward(model: nn.Module) -> Any:
            with torch.no_grad():
                return model.eval()(**copy.deepcopy(data), mode='tensor')

        return forward


def _resized(sample: Any, size: tuple[int, ...]) -> Any:
    """A data sample that speaks of an image of ``size`` (H, W)."""
    keys = ('img_shape', 'pad_shape', 'ori_shape', 'batch_input_shape')
    sample.set_metainfo({k: tuple(size) for k in keys if k in sample.metainfo})
    return sample
