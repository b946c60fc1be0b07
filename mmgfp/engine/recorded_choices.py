"""What a detector chooses to look at, recorded once and given to other models.

Two models are compared at the same positions: what a RoI head reads hangs on proposals
and on RoIs that are drawn at random. These are recorded from the model that the other
one is held against, and given to both from then on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from mmgfp.utils.errors import ConfigError

#: Methods whose results say where the next layers look: proposals, boxes that a stage
#: hands on to the next one, points of masks.
CHOICES = ('predict_by_feat', 'refine_bboxes', 'get_roi_rel_points_train')
#: The part that proposes.
RPN = 'rpn_head'


class RecordedChoices:
    """Results of the methods of a model by which it chooses what it looks at.

    Args:
        methods: Names of these methods.
        most: Proposals of an image that are kept, the first ones; all if None.
    """

    def __init__(
        self, methods: Sequence[str] = CHOICES, most: int | None = None
    ) -> None:
        self._methods, self._most = methods, most
        #: By method of a module, in the order of its calls.
        self._results: dict[tuple[str, str], list[Any]] = {}

    def made_by(self, model: Any) -> bool:
        """Return whether the model makes such choices."""
        return bool(_choosers(model, self._methods))

    def recording(
        self, model: Any, seen: list[Any] | None = None
    ) -> AbstractContextManager[None]:
        """Let a model make its choices, and remember them.

        Args:
            model: The model.
            seen: Gets what the RPN chooses by, as it runs.
        """

        def recorded(key: tuple[str, str], method: Callable[..., Any]) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                _note(key, args, seen)
                result = method(*args, **kwargs)
                if self._most is not None and key[0].startswith(RPN):
                    result = [proposals[: self._most] for proposals in result]
                self._results.setdefault(key, []).append(copy.deepcopy(result))
                return result

            return call

        return _replaced(_choosers(model, self._methods), recorded)

    def replaying(
        self, model: Any, seen: list[Any] | None = None
    ) -> AbstractContextManager[None]:
        """Let a model take the remembered choices for its own.

        Args:
            model: The model.
            seen: Gets what the RPN would choose by, as it runs.
        """

        def replayed(key: tuple[str, str], method: Callable[..., Any]) -> Any:
            results = iter(self._results.get(key, ()))

            def call(*args: Any, **kwargs: Any) -> Any:
                _note(key, args, seen)
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

        return _replaced(_choosers(model, self._methods), replayed)


def _note(key: tuple[str, str], args: Any, seen: list[Any] | None) -> None:
    if seen is not None and key[0].startswith(RPN):
        seen.append(args)


def _choosers(model: Any, methods: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Return name, method and object of all parts that choose what others read."""
    rpn, roi_head = getattr(model, RPN, None), getattr(model, 'roi_head', None)
    if not isinstance(roi_head, nn.Module):
        return []
    parts = {'roi_head': roi_head}
    if isinstance(rpn, nn.Module):
        parts[RPN] = rpn
    found = [
        (f'{part}.{name}', method, module)
        for part, head in parts.items()
        for name, module in head.named_modules()
        for method in methods
        if hasattr(module, method)
        # In a RoI head it makes results, not proposals.
        and (part == RPN or method != 'predict_by_feat')
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
