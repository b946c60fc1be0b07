"""Taking mask gradients off the layers of a model that trains, inside of backward.

Only backward passes that reach the ``.grad`` of parameters count, with all that they
add up to: the gradients of a mask are those of the weights that it scales. What
`torch.autograd.grad` asks for goes past the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from mmgfp.criteria.forward_passes import ForwardPasses
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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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


class TapHook:
    """A hook of one module; a copy of it, as in a copied or saved model, does nothing.

    Args:
        module: The module.
        function: Called with what the hook is called with, but for the module.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self._module, self._function = module, function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Do what is to be done at a call of the module."""
        if module is self._module and self._function is not None:
            return self._function(*args)
        return None

    def __reduce__(self) -> tuple[type[TapHook], tuple[()]]:
        return TapHook, ()


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
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._task: tuple[int, bool] = (-1, False)
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
        self._handles.append(register(TapHook(module, function), with_kwargs=True))

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
        if self.active and torch.is_grad_enabled() and not _in_backward():
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
        call = _Call(self, name, rows, self._passes.call(), _in_backward())
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
        call = _Call(self, name, rows, self._passes.call(), _in_backward())

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
        if not (call.again or self._reaches_parameters()):
            return
        layer, rows = call.layer, call.rows
        if call.again and self._passes.overlap:
            self.lost[layer] = OVERLAPS
            return
        if isinstance(rows, Aside):
            x, grad = x.movedim(rows.dim, 0), grad.movedim(rows.dim, 0)
            rows = rows.rows
        self._passes.close(call.batch)
        sums = self._sums.setdefault(call.batch, {})
        is_output = layer in self.outputs
        dim = 1 if is_output else self._channel_dim(layer)
        if is_output:  # one mask is on all channels
            gradient = mask_gradient(x, grad, dim, rows).sum(1, keepdim=True)
        elif self.summary is None:
            gradient = mask_gradient(x, grad, dim, rows)  # (N, C)
        else:
            gradient = self.summary(x, dim)  # (R, C)
        others = next(iter(sums.values()), gradient)
        if len(gradient) != len(others):
            found = f'{len(gradient)} images where others saw {len(others)}'
            self.lost[layer] = f'{UNTOLD}: {found}'
        elif layer in sums:
            sums[layer] += gradient
        else:
            sums[layer] = gradient

    def _reaches_parameters(self) -> bool:
        """Return whether this backward pass adds to the ``.grad`` of parameters."""
        task = torch._C._current_graph_task_id()
        if task != self._task[0]:
            self._task = (task, any(map(is_reached, self._parameters())))
        return self._task[1]

    def _parameters(self) -> Iterable[nn.Parameter]:
        for module in [*self.layers.values(), *([self._model] if self._model else [])]:
            yield from module.parameters()

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The (N, C) sums by layer since the last `take`; images of all passes."""
        return _joined([sums for sums in self._sums.values() if sums])

    def take(self) -> dict[str, Tensor]:
        """Return the (N, C) sums by layer since the last call, and start anew."""
        gradients = self.gradients
        self._sums = {}
        self._passes.overlap = False
        return gradients

    def take_lost(self) -> dict[str, str]:
        """Return layers with incomplete sums since the last call, and start anew."""
        lost, self.lost = self.lost, {}
        return lost


def is_reached(parameter: nn.Parameter) -> bool:
    """Return whether the backward pass that runs adds to a parameter's ``.grad``."""
    if not parameter.requires_grad:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # `torch.autograd.grad` asks for this very parameter
        return False


def _joined(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return sums by layer, (N, C), for the images of several forward passes."""
    if len(sums) == 1:
        return dict(sums[0])
    counts = [len(next(iter(s.values()))) for s in sums]
    joined: dict[str, Tensor] = {}
    for layer in dict.fromkeys(layer for s in sums for layer in s):
        example = next(s[layer] for s in sums if layer in s)
        none = example.new_zeros(1)
        parts = [
            s.get(layer, none.expand(n, *example.shape[1:]))
            for s, n in zip(sums, counts, strict=True)
        ]
        joined[layer] = torch.cat(parts)
    return joined
