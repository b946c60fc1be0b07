"""Module attributes that hold a number of channels on which the module's code relies.

A RoI extractor, for one, allocates ``out_channels`` channels for its output, but owns
no tensor from which a pruned model could tell how many remain. Which channels such an
attribute counts is read off the trace: those that the module reads or returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from mmgfp.tracing.labels import varying
from mmgfp.tracing.value import Value
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import modules_with_hooks

#: Attributes by name, and whose channels they count: what goes in or what comes out.
WIDTH_ATTRIBUTES: dict[str, Literal['input', 'output']] = {
    'in_channels': 'input',
    'out_channels': 'output',
}

#: Tensors as outputs of autograd nodes.
Outputs = list[tuple[Any, int]]


def width_attributes(module: nn.Module) -> dict[str, int]:
    """Return the attributes of ``module`` that count channels, with their values."""
    values = {name: getattr(module, name, None) for name in WIDTH_ATTRIBUTES}
    return {n: v for n, v in values.items() if type(v) is int}


@contextmanager
def watch_widths(
    model: nn.Module, skip: Callable[[nn.Module], bool]
) -> Iterator[dict[str, Outputs]]:
    """Collect the tensors whose channels each attribute counts.

    Args:
        model: The module that is about to be traced.
        skip: Says which modules are not watched, as their own tensors tell the widths.

    Yields:
        dict: Tensors by name of the attribute, filled while the model runs.
    """
    counted: dict[str, Outputs] = {}

    def watch(name: str, sides: Sequence[str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = {'input': [*args, *kwargs.values()][:1], 'output': output}
            for side in sides:
                nodes = [
                    (t.grad_fn, t.output_nr)
                    for t in tree_tensors(tensors[side])
                    if t.grad_fn is not None and t.numel()
                ]
                attributes = [a for a, s in WIDTH_ATTRIBUTES.items() if s == side]
                for attribute in attributes:
                    counted.setdefault(f'{name}.{attribute}', []).extend(nodes)

        return hook

    handles = []
    for name, module in modules_with_hooks(model):
        sides = [WIDTH_ATTRIBUTES[a] for a in width_attributes(module)]
        if name and sides and not skip(module):
            hook = watch(name, sides)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def width_labels(
    model: nn.Module,
    widths: Mapping[str, Outputs],
    values: Mapping[Any, Sequence[Value]],
) -> dict[str, list[Tensor]]:
    """Return the labels of the channels that each attribute counts, (C,) per tensor.

    Args:
        model: The traced module.
        widths: The tensors that `watch_widths` collected.
        values: The outputs of each node, with their labels.

    Returns:
        dict: By name of the attribute; left out are those whose channels have no
        labels, which pruning does not change.
    """
    counted = {}
    for name, outputs in widths.items():
        module, _, attribute = name.rpartition('.')
        size = getattr(model.get_submodule(module), attribute)
        labels = [_labels(values[n][i], size) for n, i in outputs if n in values]
        if labels and all(labels):
            counted[name] = [vector for vectors in labels for vector in vectors]
    return counted


def _labels(value: Value, size: int) -> list[Tensor]:
    """Return the distinct label vectors along the dimension of ``size``, (size,)."""
    for plane in value.planes:
        # Of several dimensions of that size, channels are the second: (N, C, ...).
        for dim in sorted(varying(plane), key=lambda d: d != 1):
            if plane.shape[dim] == size:
                rows = plane.movedim(dim, -1).reshape(-1, size)
                return list(rows.unique(dim=0))
    return []
