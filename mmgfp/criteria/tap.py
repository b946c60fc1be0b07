"""Taking mask gradients off the layers of a model that trains, inside of backward.

Only backward passes that reach the ``.grad`` of parameters count, with all that they
add up to: the gradients of a mask are those of the weights that it scales. What
`torch.autograd.grad` asks for goes past the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from mmgfp.criteria.backward_passes import ReachedParameters, in_backward
from mmgfp.criteria.forward_passes import ForwardPasses
from mmgfp.criteria.image_sums import ImageSums
from mmgfp.criteria.mask_gradients import mask_gradient
from mmgfp.criteria.masked_inputs import MaskedInputs
from mmgfp.tracing import RowUse
from mmgfp.tracing.operands import KEPT, find_reader
from mmgfp.tracing.row_use import UNTOLD
from mmgfp.tracing.row_values import Aside, Lost, Rows
from mmgfp.tracing.rows import (
    layer_input,
    mark_output,
    mark_rows,
    rows_of_operand,
    rows_read,
    with_input,
)
from mmgfp.tracing.value import op_name
from mmgfp.utils.module_hooks import ModuleHook

#: Under this name a layer's tapped input knows what it was before.
UNTAPPED = 'mmgfp_untapped'
#: Under this name a tensor knows how it was tapped last.
TAPPED = 'mmgfp_tapped'
#: Why a layer's gradients are incomplete.
FROZEN = 'its input needs no gradient, as behind frozen layers'
OVERLAPS = (
    'a checkpointed part of one forward pass runs again after another one has begun'
)
UNKEPT = 'what its weight reads is not kept, as in frozen layers and checkpointed parts'
TWICE = 'it changes its input, and its gradient is used in a loss'
OVERWRITTEN = 'its input has been changed in place before backward'


#: Sums over samples and positions of a layer's input, (R, C), from the input and the
#: dimension that holds its channels; those of several calls are added.
Summary = Callable[[Tensor, int], Tensor]


def _shareable(x: Tensor) -> bool:
    """Return whether other layers may read ``x`` through the same tap.

    A leaf may outlive the graph. Whoever watches what is saved for backward, as
    checkpointing does, must see the same again when it runs a part twice; where torch
    does not say whether somebody watches, nothing is shared.
    """
    hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return x.grad_fn is not None and hooks is not None and hooks(True) is None


class _Call(NamedTuple):
    """One tapped call of a layer.

    Attributes:
        tap: Where its gradients go.
        layer: Name of the layer.
        rows: The images of what it reads.
        batch: Number of the forward pass, each with images of its own.
        again: A checkpointed part runs it again inside of backward.
    """

    tap: MaskGradientTap
    layer: str
    rows: Rows | Aside
    batch: int
    again: bool


class _Tap(torch.autograd.Function):
    """The identity; its backward hands input and gradient to a `MaskGradientTap`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), call = grads, ctx.call
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:
            # A frozen layer has no need of its input in backward, which may go on.
            if 'modified by an inplace operation' not in str(error):
                raise
            call.tap.lost[call.layer] = OVERWRITTEN
            return grad, None
        # What weights kept aside would add, for the masks alone.
        with_masked = grad
        for dim, entries, extra in getattr(ctx, 'masked', ()):
            extra = extra.to(grad.dtype)
            with_masked = with_masked.index_add(dim, entries, extra)
        ctx.masked = ()  # backward may come again
        call.tap.add(call, x, with_masked)
        is_scaled = call.tap.summary is None
        if is_scaled and torch.is_grad_enabled() and grad.requires_grad:
            # The mask scales the gradient as well, which a loss may depend on.
            grad = _Tap.apply(grad, call)
        return grad, None


class _OutputTap(_Tap):
    """The same for what a layer puts out, which code may change in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        return x.clone()


def _rows(use: RowUse, name: str, layer: nn.Module, x: Tensor) -> Rows | Lost:
    """Return the images of the rows that a layer reads, or puts out."""
    if name in use.images:
        return Rows(len(x))
    rows = rows_read(layer, x)
    if name in use.rois and isinstance(rows, Rows) and not rows.pooled:
        return Lost('the features of its RoIs need no gradient')
    return rows


class MaskGradientTap:
    """Takes mask gradients off the layers of a model, call by call.

    Nothing outlives backward but one (N, C) sum per layer; several calls of a shared
    layer add up. Layers that read the same tensor are tapped together, as the sum of
    their mask gradients is all that matters: it stands under the name of the first.

    Args:
        layers: Modules to tap, by the name of their weight.
        use: What the layers read; where it does not say, the rows are followed
            through the graph.
        units: The unit of each input channel by layer, (C,). Layers of other units
            are not tapped together, and none without it.
        model: The module that the layers are of.
        summary: What to take off the inputs in place of the mask gradients.
        masked: Gives the inputs that pruned units are read by gradients, too.
        outputs: Modules whose outputs are tapped as a whole, by a name that no layer
            has; their mask gradients are (N, 1).

    Attributes:
        active: Whether calls are tapped; otherwise they cost nothing.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        use: RowUse = RowUse(),  # noqa: B008
        units: Mapping[str, Tensor] | None = None,
        model: nn.Module | None = None,
        summary: Summary | None = None,
        masked: MaskedInputs | None = None,
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.outputs = dict(outputs or {})
        self.use, self.summary, self.masked = use, summary, masked
        self.active = True
        self._model = model
        #: Equal for layers that read one tensor in the same way.
        self._ways: dict[str, Any] = {
            name: (
                self._channel_dim(name),
                name in use.images,
                name in use.rois,
                name if units is None else units[name].numpy().tobytes(),
            )
            for name in self.layers
        }
        self._passes = ForwardPasses(use)
        self._sums = ImageSums()
        whole = [] if model is None else [model]
        self._parameters = ReachedParameters([*self.layers.values(), *whole])
        self.lost: dict[str, str] = {}
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Start to tap."""
        modules = {} if self._model is None else dict(self._model.named_modules())
        for name in self.use.entry | self.use.reentry:
            self._hook(modules[name], self._enter, before=True)
        for name, module in self.layers.items():

            def tap(args: Any, kwargs: Any, name: str = name) -> Any:
                return self._tap(name, args, kwargs)

            def read(args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                self._tap_inside(name, output)

            inside = name in self.use.inside
            self._hook(module, read if inside else tap, before=not inside)
            if self.masked is not None and not inside:
                self._hook(module, self._mask_hook(name, module), before=False)
        for name, last in self.outputs.items():
            tap_output = partial(self._tap_output, name, modules[last])
            self._hook(modules[last], tap_output, before=False)
        for name in self.use.first & modules.keys():

            def mark(args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                read = self._passes.reader(name)
                mark_output(args, kwargs, output, read)

            self._hook(modules[name], mark, before=False)

    def _hook(
        self, module: nn.Module, function: Callable[..., Any], before: bool
    ) -> None:
        register = (
            module.register_forward_pre_hook if before else module.register_forward_hook
        )
        self._handles.append(register(ModuleHook(module, function), with_kwargs=True))

    def detach(self) -> None:
        """Remove every trace from the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _mask_hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        """Return a hook that lets the tap of a call know of masked columns."""
        masked, dim = self.masked, self._channel_dim(name)
        assert masked is not None

        def hook(args: Any, kwargs: Any, output: Any) -> None:
            if self.active and torch.is_grad_enabled():
                masked.watch(name, module, layer_input(args, kwargs), output, dim)

        return hook

    def _enter(self, args: Any, kwargs: Any) -> None:
        if self.active and torch.is_grad_enabled() and not in_backward():
            self._passes.enter(args, kwargs)

    def _tap(self, name: str, args: Any, kwargs: Any) -> Any:
        x = original = layer_input(args, kwargs)
        if not (self.active and torch.is_grad_enabled() and len(x)):
            return None
        if torch._C._are_functorch_transforms_active():
            return None  # such gradients reach no parameter
        if not x.requires_grad:
            self.lost[name] = FROZEN
            return None
        # A layer inside another one, such as the offsets of a deformable convolution,
        # reads the same input but has a mask copy of its own.
        x = getattr(x, UNTAPPED, x)
        reading = (id(self), x._version, self._passes.number, self._ways[name])
        shareable = x is original and _shareable(x)
        if shareable and hasattr(x, TAPPED):
            *other, tapped = getattr(x, TAPPED)
            if (*other,) == reading and tapped() is not None:
                return with_input(tapped(), args, kwargs)
        tapped = self._apply(_Tap, name, _rows(self.use, name, self.layers[name], x), x)
        if tapped is None:
            return None
        setattr(tapped, UNTAPPED, x)
        if shareable:
            setattr(x, TAPPED, (*reading, TensorWeakRef(tapped)))
        return with_input(tapped, args, kwargs)

    def _apply(self, tap: Any, name: str, rows: Rows | Lost, x: Tensor) -> Any:
        """Return a tensor with a tap on it, None where its rows are of no images."""
        if isinstance(rows, Lost) and not isinstance(rows, Aside):
            self.lost[name] = f'{UNTOLD}: {rows.reason}'
            return None
        call = _Call(self, name, rows, self._passes.call(), in_backward())
        tapped = tap.apply(x, call)
        mark_rows(tapped, rows)
        return tapped

    def _tap_output(
        self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        """Tap what the last norm or layer of a residual block puts out."""
        taps = self.active and torch.is_grad_enabled() and len(output)
        if not taps or torch._C._are_functorch_transforms_active():
            return None
        if not output.requires_grad:
            self.lost[name] = FROZEN
            return None
        rows = _rows(self.use, self.outputs[name], layer, output)
        return self._apply(_OutputTap, name, rows, output)

    def _tap_inside(self, name: str, output: Any) -> None:
        """Tap the node by which the weight of a layer reads."""
        if not (self.active and torch.is_grad_enabled() and output.requires_grad):
            return
        if torch._C._are_functorch_transforms_active():
            return
        weight: Any = self.layers[name].weight
        found = None if not _shareable(output) else find_reader(output.grad_fn, weight)
        if found is None:  # a frozen layer, or a checkpointed part
            self.lost[name] = UNKEPT
            return
        node, position = found
        rows = rows_of_operand(node, position)
        if isinstance(rows, Lost):
            self.lost[name] = f'{UNTOLD}: {rows.reason}'
            return
        x = getattr(node, KEPT[op_name(node)]).detach()
        call = _Call(self, name, rows, self._passes.call(), in_backward())

        def hook(grads: Sequence[Tensor], _: Any) -> None:
            if torch.is_grad_enabled():
                self.lost[name] = TWICE
            elif grads[position] is not None:
                self.add(call, x, grads[position])

        node.register_hook(hook)

    def _channel_dim(self, name: str) -> int:
        is_linear = isinstance(self.layers[name], nn.Linear) or name in self.use.last
        return -1 if is_linear else 1

    def add(self, call: _Call, x: Tensor, grad: Tensor) -> None:
        """Add one call's mask gradients to the layer's sum."""
        if torch.is_grad_enabled():  # under `create_graph=True`
            x, grad = x.detach(), grad.detach()
        if not (call.again or self._parameters.are_reached()):
            return
        layer, rows = call.layer, call.rows
        if call.again and self._passes.overlap:
            self.lost[layer] = OVERLAPS
            return
        if isinstance(rows, Aside):
            x, grad = x.movedim(rows.dim, 0), grad.movedim(rows.dim, 0)
            rows = rows.rows
        self._passes.close(call.batch)
        is_output = layer in self.outputs
        dim = 1 if is_output else self._channel_dim(layer)
        if is_output:  # one mask is on all channels
            gradient = mask_gradient(x, grad, dim, rows).sum(1, keepdim=True)
        elif self.summary is None:
            gradient = mask_gradient(x, grad, dim, rows)  # (N, C)
        else:
            gradient = self.summary(x, dim)  # (R, C)
        if reason := self._sums.add(call.batch, layer, gradient):
            self.lost[layer] = f'{UNTOLD}: {reason}'

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The (N, C) sums by layer since the last `take`; images of all passes."""
        return self._sums.joined

    def take(self) -> dict[str, Tensor]:
        """Return the (N, C) sums by layer since the last call, and start anew."""
        gradients = self.gradients
        self._sums.clear()
        self._passes.overlap = False
        return gradients

    def take_lost(self) -> dict[str, str]:
        """Return layers with incomplete sums since the last call, and start anew."""
        lost, self.lost = self.lost, {}
        return lost
