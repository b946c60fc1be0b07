"""Losses of a detector that do not change with what the detector proposes.

Two models are compared at the same positions: what a RoI head reads hangs on proposals
and on RoIs that are drawn at random. These are recorded once, from the model that the
other one is held against, and given to both from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.engine.batch_calls import BatchCalls
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.trial_runs import random_states_restored, seed_all, undisturbed

#: Methods whose results say where the next layers look: proposals, boxes that a stage
#: hands on to the next one, points of masks.
CHOICES = ('predict_by_feat', 'refine_bboxes', 'get_roi_rel_points_train')
#: Results of one method of one module, in the order of its calls.
Results = dict[tuple[str, str], list[Any]]


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
        self._recorded: Results = {}
        choosers = _choosers(model)
        if choosers:
            with undisturbed(model), torch.no_grad(), self._recording(choosers):
                model.eval()
                self._loss(model)

    def __call__(self, model: Any) -> Tensor:
        """Return the loss, a scalar.

        Raises:
            ConfigError: If the model makes other choices than the recorded one.
        """
        with self._replaying(_choosers(model)):
            return self._loss(model)

    def _loss(self, model: Any) -> Tensor:
        with random_states_restored(model):
            seed_all(self._seed)
            # Preprocessed for each call: floats take four times the memory.
            return BatchCalls(model, self._data).loss(model)

    def _recording(self, choosers: Any) -> Any:
        def recorded(key: tuple[str, str], method: Callable[..., Any]) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                result = method(*args, **kwargs)
                self._recorded.setdefault(key, []).append(copy.deepcopy(result))
                return result

            return call

        return _replaced(choosers, recorded)

    def _replaying(self, choosers: Any) -> Any:
        def replayed(key: tuple[str, str], method: Callable[..., Any]) -> Any:
            results = iter(self._recorded.get(key, ()))

            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    # A copy, since heads may change what they are given in place.
                    return copy.deepcopy(next(results))
                except StopIteration:
                    raise ConfigError(
                        'the model',
                        'one that proposes as often as the recorded one',
                        f'another call of {".".join(key)}',
                        'record the loss of a model of the same class',
                    ) from None

            return call

        return _replaced(choosers, replayed)


def recorded_losses(model: Any, batches: Iterable[Any]) -> list[RecordedLoss]:
    """Return the losses of batches as a train dataloader gives them.

    Args:
        model: The original model.
        batches: The batches, before the data preprocessor.
    """
    return [RecordedLoss(model, data, seed) for seed, data in enumerate(batches)]


def _choosers(model: Any) -> list[tuple[str, str, Any]]:
    """Return name, method and object of all parts that choose what others read."""
    rpn, roi_head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    if not isinstance(roi_head, nn.Module):
        return []
    parts = {'roi_head': roi_head}
    if isinstance(rpn, nn.Module):
        parts['rpn_head'] = rpn
    found = [
        (f'{part}.{name}', method, module)
        for part, head in parts.items()
        for name, module in head.named_modules()
        for method in CHOICES
        if hasattr(module, method)
        # In a RoI head it makes results, not proposals.
        and (part == 'rpn_head' or method != 'predict_by_feat')
    ]
    samplers: Any = getattr(roi_head, 'bbox_sampler', None)
    samplers = samplers if isinstance(samplers, list) else [samplers]
    found += [
        (f'roi_head.bbox_sampler.{i}', 'sample', sampler)
        for i, sampler in enumerate(samplers)
        if sampler is not None
    ]
    return found


@contextmanager
def _replaced(
    choosers: Iterable[tuple[str, str, Any]],
    substitute: Callable[[tuple[str, str], Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Put substitutes in the place of methods for a while."""
    done = []
    try:
        for name, method, owner in choosers:
            setattr(owner, method, substitute((name, method), getattr(owner, method)))
            done.append((owner, method))
        yield
    finally:
        for owner, method in done:
            delattr(owner, method)
