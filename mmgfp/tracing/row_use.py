"""What a model's layers read: images or RoIs, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.tracing.operands import Alias, CallNodes
from mmgfp.tracing.row_values import Aside, Lost, Rows, RowState
from mmgfp.tracing.rows import layer_input, mark_output, rows_read, with_input
from mmgfp.utils.trial_runs import modules_with_hooks

#: Under this name the input of a call knows how often it had been changed.
VERSION = 'mmgfp_version'
#: Why a layer's gradients are incomplete; the detail follows.
UNTOLD = 'its rows cannot be told to images'


@dataclass(frozen=True)
class LayerCalls:
    """Rows that a layer's calls were given.

    Attributes:
        rows: The rows of each call; None for a call without any.
        first: Whether the layer read a tensor that no other layer made.
        sources: The rows of each call that reads the images themselves.
        inputs: The nodes that stand for the inputs of its calls.
        outputs: The nodes of their outputs.
        in_place: Whether a call changed its input in place.
    """

    rows: list[RowState] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    sources: list[RowState] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    in_place: list[bool] = field(default_factory=list)

    @property
    def nodes(self) -> CallNodes:
        """The nodes of its calls."""
        return CallNodes(self.inputs, self.outputs, any(self.in_place))

    def add(self, layer: nn.Module, x: Any, first: bool = False) -> Tensor | None:
        """Take in a call; return what it is to be called with, if not ``x``."""
        if not isinstance(x, Tensor):
            self.rows.append(Lost('its input is no tensor'))
            return None
        self.rows.append(rows_read(layer, x) if len(x) else None)
        self.first.append(first or x.grad_fn is None)
        if self.first[-1]:
            self.sources.append(self.rows[-1])
        if x.grad_fn is None:
            return None
        # Other layers may read the same tensor; this name is for this call alone.
        alias: Any = Alias.apply(x)
        self.inputs.append(alias.grad_fn)
        setattr(alias, VERSION, alias._version)
        return alias


@contextmanager
def watch_rows(
    model: nn.Module, first: Iterable[str] = ()
) -> Iterator[dict[str, LayerCalls]]:
    """Collect the rows that each module with a weight is called with.

    Args:
        model: The module that is about to run.
        first: Layers that read images which have a history.

    Yields:
        dict: Calls by name of the module, filled while the model runs.
    """
    calls: dict[str, LayerCalls] = {}

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
            seen = calls.setdefault(name, LayerCalls())
            if not torch.is_grad_enabled():
                return None  # as when a sampler scores RoIs: no statistics come of it
            alias = seen.add(module, layer_input(args, kwargs), name in first)
            return None if alias is None else with_input(alias, args, kwargs)

        return hook

    def close(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            mark_output(args, kwargs, output)
            if isinstance(output, Tensor) and output.grad_fn is not None:
                calls[name].outputs.append(output.grad_fn)
            alias = layer_input(args, kwargs)
            version = getattr(alias, VERSION, None)
            if version is not None and alias._version != version:
                calls[name].in_place.append(True)

        return hook

    handles = []
    for name, module in modules_with_hooks(model):
        if isinstance(getattr(module, 'weight', None), Tensor):
            before = module.register_forward_pre_hook(watch(name), with_kwargs=True)
            after = module.register_forward_hook(close(name), with_kwargs=True)
            handles += [before, after]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RowUse:
    """Layers by what their rows are; all are names of modules.

    Attributes:
        called: Layers that were called at all.
        first: Layers that read the images themselves.
        images: Layers that read one row for each image in all calls.
        rois: Layers that read RoIs in all calls.
        lost: Layers whose inputs do not tell what their weights read of each image,
            with the reason.
        repeated: First layers that read several rows of each image, side by side.
        cycled: First layers that read the images over and over again.
        parted: First layers that read a part of the images in each call.
        entry: The module each call of which brings further images.
        reentry: The same where one loss calls it several times with the same images;
            its first call after a backward pass brings further ones.
        inside: Layers whose weight reads something else than their input.
        last: Layers whose channels lie along the last dimension.
    """

    called: frozenset[str] = frozenset()
    first: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    rois: frozenset[str] = frozenset()
    lost: Mapping[str, str] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    cycled: frozenset[str] = frozenset()
    parted: frozenset[str] = frozenset()
    entry: frozenset[str] = frozenset()
    reentry: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()


def judge_rows(calls: Mapping[str, LayerCalls], images: int | None = None) -> RowUse:
    """Sum up the calls that `watch_rows` collected.

    Args:
        calls: The calls by name of the module.
        images: Number of images; if not given, the first layer with known rows says it.
    """
    states = {
        n: [_beside(r) for r in c.rows if r is not None] for n, c in calls.items()
    }
    every = [r for rows in states.values() for r in rows]
    count = next((r.images for r in every if isinstance(r, Rows)), 0)
    count = count if images is None else images
    lost = {
        name: f'{UNTOLD}: {_reason(r, count)}'
        for name, rows in states.items()
        for r in rows
        if isinstance(r, Lost) or r.images != count
    }
    known = {
        name: [r for r in rows if isinstance(r, Rows)]
        for name, rows in states.items()
        if rows and name not in lost
    }
    return RowUse(
        frozenset(calls),
        frozenset(n for n, c in calls.items() if any(c.first)),
        frozenset(n for n, c in known.items() if all(r.index is None for r in c)),
        frozenset(n for n, c in known.items() if all(r.pooled for r in c)),
        lost,
    )


def _beside(state: Rows | Lost) -> Rows | Lost:
    """Return the rows along another dimension as rows that are not the images."""
    if not isinstance(state, Aside):
        return state
    rows = state.rows
    index = torch.arange(rows.images) if rows.index is None else rows.index
    return rows.moved(index)


def _reason(rows: Rows | Lost, count: int) -> str:
    if isinstance(rows, Lost):
        return rows.reason
    return f'{rows.images} images, not {count}'
