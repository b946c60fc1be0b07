"""Module attributes that repeat a number of channels which their code relies on.

A RoI extractor, for one, allocates ``out_channels`` channels for its output, but owns
no tensor from which a pruned model could tell how many are left. What such an
attribute counts is read off the trace: the channels that the module reads or gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from mmgfp.tracing.labels import varying
from mmgfp.tracing.value import Value
from mmgfp.utils.tree import tree_tensors

#: Attributes by name, and whose channels they count: what goes in or what comes out.
WIDTH_ATTRIBUTES: dict[str, Literal['input', 'output']] = {
    'in_channels': 'input',
    'out_channels': 'output',
}

#: Tensors as outputs of autograd nodes.
Outputs = list[tuple[Any, int]]


def width_attributes(module: nn.Module) -> dict[str, int]:
    """Attributes of ``module`` that count channels, with their values."""
    values = {name: getattr(module, name, None) for name in WIDTH_ATTRIBUTES}
    return {n: v for n, v in values.items() if type(v) is int}


@contextmanager
def watch_widths(
    model: nn.Module, skip: Callable[[nn.Module], bool]
) -> Iterator[dict[str, Outputs]]:
    """Collect the tensors whose channels each attribute counts.

    Args:
        model: The module that is about to be traced.
        skip: Says which modules can tell their attributes from their own tensors.
    """
    found: dict[str, Outputs] = {}

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
                    found.setdefault(f'{name}.{attribute}', []).extend(nodes)

        return hook

    handles = []
    for name, module in model.named_modules():
        sides = [WIDTH_ATTRIBUTES[a] for a in width_attributes(module)]
        if name and sides and not skip(module):
            hook = watch(name, sides)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def width_labels(
    model: nn.Module,
    widths: Mapping[str, Outputs],
    values: Mapping[Any, Sequence[Value]],
) -> dict[str, list[Tensor]]:
    """Labels of the channels that each attribute counts, (C,) for each tensor.

    Args:
        model: The traced module.
        widths: What `watch_widths` collected.
        values: What tracing knows of the nodes that the loss depends on.

    Returns:
        dict: By name of the attribute; left out are those whose channels have no
        labels, which pruning does not change.
    """
    found = {}
    for name, outputs in widths.items():
        module, _, attribute = name.rpartition('.')
        size = getattr(model.get_submodule(module), attribute)
        labels = [_labels(values[n][i], size) for n, i in outputs if n in values]
        if labels and all(labels):
            found[name] = [vector for vectors in labels for vector in vectors]
    return found


def _labels(value: Value, size: int) -> list[Tensor]:
    """Labels of the dimension of ``size``, all that differ along the others."""
    for plane in value.planes:
        for dim in sorted(varying(plane), key=lambda d: d != 1):  # (N, C, ...)
            if plane.shape[dim] == size:
                rows = plane.movedim(dim, -1).reshape(-1, size)
                return list(rows.unique(dim=0))
    return []
