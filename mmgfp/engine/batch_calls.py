"""Calls of an OpenMMLab model on a training batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmgfp.discovery.profile import profile_layers
from mmgfp.engine.two_stage import fixed_proposals, rois_per_image
from mmgfp.selection.costs import LayerProfile
from mmgfp.utils.errors import ConfigError

#: Modes in which a model may give its outputs, best first. Some models cannot give raw
#: outputs, and some cannot infer from what they train on: their losses have to do.
MODES = ('tensor', 'predict', 'loss')


class BatchCalls:
    """The calls that pruning makes on one batch as a train dataloader gives it.

    Args:
        model: The model without a wrapper such as DDP.
        data_batch: The batch, before the data preprocessor; it is left untouched.
        training: Whether it is preprocessed as in training, with what mixes images.
    """

    def __init__(self, model: Any, data_batch: Any, training: bool = True) -> None:
        self.data = model.data_preprocessor(copy.deepcopy(data_batch), training)
        inputs = self.data['inputs']
        views = inputs if isinstance(inputs, list | tuple) else [inputs]
        self.images = len(views[0])
        self.size = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
        self._mode: str | None = None

    @property
    def without_boxes(self) -> bool:
        """Whether these are images for detection on which nothing is annotated.

        Some heads read nothing then, and the graph does not show what they share.
        """
        samples = self.data.get('data_samples') or ()
        annotations = [s.gt_instances for s in samples if 'gt_instances' in s]
        return bool(annotations) and not any(len(boxes) for boxes in annotations)

    def loss(self, model: Any) -> Tensor:
        """Return the training loss, a scalar."""
        losses = model(**copy.deepcopy(self.data), mode='loss')
        return model.parse_losses(losses)[0]

    def steady_loss(self, model: Any) -> Tensor:
        """Return the training loss on made-up proposals, to compare models by."""
        with fixed_proposals(model):
            return self.loss(model)

    def forward(self, model: nn.Module) -> Any:
        """Return all outputs of inference, before post-processing where possible.

        Two-stage detectors work on made-up proposals, which do not depend on rounding;
        the outputs of the RPN are among those returned.
        """
        return self._outputs(model, self.data)

    def profile(
        self, model: nn.Module, shape: Sequence[int] | None = None
    ) -> dict[str, LayerProfile]:
        """Return the sizes each layer works on for one image, for counting costs.

        Args:
            model: The model; it is left as it is.
            shape: Size (C, H, W) of the image; that of the batch by default.

        Returns:
            dict: The profiles by weight; RoI heads are counted for `rois_per_image`.

        Raises:
            ConfigError: If ``shape`` is not (C, H, W) with the model's channels, or the
                model does not run on such an image.
        """
        rois = rois_per_image(model)
        if shape is None:
            return profile_layers(model, self.forward, self.images, rois)
        try:
            return profile_layers(model, self.sized_forward(shape), 1, rois)
        except ConfigError:
            raise
        except Exception as error:  # each layer that fails has an error of its own
            reason = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
            raise ConfigError(
                'input_shape',
                'the size (C, H, W) of an image that the model runs on',
                f'{tuple(shape)}, {reason}',
                'give a size that it was trained with',
            ) from error

    def _outputs(self, model: nn.Module, data: dict) -> Any:
        inputs = data['inputs']
        if isinstance(inputs, list | tuple):  # several views of the same images
            data = {**data, 'inputs': inputs[0]}
        model.eval()  # some models take and give other things while they train
        with fixed_proposals(model) as proposals:
            outputs = self._raw(model, data)
        return (outputs, proposals) if proposals else outputs

    def _raw(self, model: nn.Module, data: dict) -> Any:
        """Return raw outputs; results or losses where the model cannot give those.

        The first call, which comes before anything is cut, decides for all.
        """
        modes = MODES if self._mode is None else (self._mode,)
        for mode in modes:
            try:
                outputs = model(**copy.deepcopy(data), mode=mode)
            except Exception as error:
                if mode == modes[-1]:
                    raise
                print_log(
                    f'{type(model).__name__} fails in mode={mode!r} '
                    f'({type(error).__name__}: {error}): another mode is compared',
                    'current',
                )
            else:
                self._mode = mode
                return outputs
        raise AssertionError('no mode')

    def sized_forward(self, shape: Sequence[int]) -> Callable[[nn.Module], Any]:
        """Return a call on one image of ``shape`` (C, H, W), to count costs with.

        Raises:
            ConfigError: If ``shape`` is not (C, H, W) with the model's channels.
        """
        data = self._sized(shape, 1)

        def forward(model: nn.Module) -> Any:
            with torch.no_grad():
                return self._outputs(model, data)

        return forward

    def inference(
        self, model: nn.Module, shape: Sequence[int], images: int = 1
    ) -> Callable[[nn.Module], Any]:
        """Return a call on random images, to be timed.

        It gives raw outputs where the model has them. Unlike in `forward`, the second
        stage works on proposals of the RPN.

        Args:
            model: A model in eval mode, which is run once to see which mode works.
            shape: Size (C, H, W) of an image.
            images: Number of images.

        Raises:
            ConfigError: If ``shape`` is not (C, H, W) with the model's channels.
            Exception: If the model cannot infer, its own error.
        """
        data = self._sized(shape, images)
        data['inputs'] = torch.rand_like(data['inputs'])
        mode = 'tensor'
        with torch.inference_mode():
            try:
                model(**data, mode=mode)
            except Exception as error:
                mode = 'predict'
                print_log(
                    f'{type(model).__name__} gives no raw outputs '
                    f'({type(error).__name__}: {error}): its results are timed',
                    'current',
                )
                model(**data, mode=mode)

        def infer(model: nn.Module) -> Any:
            return model(**data, mode=mode)

        return infer

    def _sized(self, shape: Sequence[int], images: int) -> dict[str, Any]:
        """Return ``images`` blank copies of the first sample, each (C, H, W)."""
        inputs = self.data['inputs']
        inputs = inputs[0] if isinstance(inputs, list | tuple) else inputs
        if len(shape) != 3 or shape[0] != inputs.shape[1] or min(shape) < 1:
            raise ConfigError(
                'input_shape',
                f'(C, H, W) with C = {inputs.shape[1]}',
                repr(shape),
                'give the size at which the costs shall be counted',
            )
        samples = self.data.get('data_samples')
        return {
            **self.data,
            'inputs': inputs.new_zeros(images, *shape),
            'data_samples': samples
            and [_resized(copy.deepcopy(samples[0]), shape[1:]) for _ in range(images)],
        }


def _resized(sample: Any, size: Sequence[int]) -> Any:
    """Change a data sample to one of an image of ``size`` (H, W)."""
    keys = ('img_shape', 'pad_shape', 'ori_shape', 'batch_input_shape')
    sample.set_metainfo({k: tuple(size) for k in keys if k in sample.metainfo})
    return sample
