"""Comparing what a masked and a compact copy of a model put out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmgfp.discovery.leaky import in_leaky_mode
from mmgfp.discovery.probing import error_line, run
from mmgfp.utils.tree import tree_tensors
from mmgfp.utils.trial_runs import Forward

#: Largest difference of an output, see `difference`, that still counts as equal.
TOLERANCE = 1e-4
#: Outputs above this say nothing of the size of the others, if there are any.
HUGE = 1e4


def difference(a: Any, b: Any) -> float:
    """Return the largest difference between two trees of tensors.

    Each element's is relative to its value in the first tree, or to the `typical_size`
    of its tensor where that is larger.

    Returns:
        float: 0 for equal trees, infinity where shapes differ or a value is not finite.

    Raises:
        ValueError: If the trees hold different numbers of tensors.

    Examples:
        >>> import torch
        >>> difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]))
        0.25
    """
    worst = 0.0
    pairs = list(zip(tree_tensors(a), tree_tensors(b), strict=True))
    for x, y in pairs:
        if x.shape != y.shape or not (x.isfinite().all() and y.isfinite().all()):
            return float('inf')
        if x.numel():
            # Half precision rounds differences, and what they are divided by, to zero.
            precision = torch.promote_types(x.dtype, torch.float32)
            x, y = x.to(precision), y.to(precision)
            scale = x.abs().clamp(min=typical_size(x))
            worst = max(worst, float(((x - y).abs() / scale).max()))
    return worst if pairs else float('inf')


def typical_size(x: Tensor) -> float:
    """Return the median magnitude of a tensor's ordinary elements, at least 1e-12.

    Zeros are not ordinary, nor are values such as the -1e9 that stands for a masked
    position, which would hide a difference elsewhere, nor what rounding leaves of zero.

    Examples:
        >>> import torch
        >>> typical_size(torch.tensor([0, 0, 0, 0.5, 1, 2, -1e9, -1e9, -1e9, -1e9]))
        1.0
    """
    sizes = x.detach().abs()
    sizes = sizes[sizes > 0]
    if not sizes.numel():
        return 1e-12
    # A share of the largest, since rounding errors grow with it.
    least = 1e-10 * min(float(sizes.max()), 1e10)
    moderate = sizes[sizes <= HUGE]
    if moderate.numel():
        sizes = moderate[moderate >= 1e-9 * moderate.max()]
    return max(float(sizes.median()), least, 1e-12)


class OutputCheck:
    """Compares the outputs of a masked and of a compact copy of a model.

    Copies that agree in single precision mostly do in double, which takes several times
    as long. It decides where they do not, unless the model runs in single alone, and
    from then on by itself where the difference was one of rounding.

    Args:
        forward: Calls a copy of the model and returns all outputs.
        leaky: Whether to compare where nothing is dead on the batch, unless code counts
            on ReLU.
        in_double: Whether to leave out single precision, unless double fails.
    """

    def __init__(
        self, forward: Forward, leaky: bool = False, in_double: bool = False
    ) -> None:
        self._forward = in_leaky_mode(forward) if leaky else forward
        self._leaky = leaky
        self._single_suffices = not in_double

    def __call__(self, masked: nn.Module, small: nn.Module) -> str | None:
        """Return why the copies disagree, None if they agree.

        Both are left in either precision.

        Raises:
            Exception: If ``forward`` fails for the masked copy, which is no fault of
                the groups, or memory runs out.
        """
        reason = None
        if self._single_suffices:
            try:
                reason = self._compare(masked.float(), small.float(), in_double=False)
            except Exception as error:  # as of a model that names double precision
                error_line(error)  # raises it if memory ran out
            else:
                if reason is None:
                    return None
        try:
            found = self._compare(masked.double(), small.double(), in_double=True)
        except Exception as error:
            error_line(error)
            if reason or self._leaky:
                return reason
            if self._single_suffices:
                raise
            return self._compare(masked.float(), small.float(), in_double=False)
        self._single_suffices &= found is not None
        return found

    @torch.no_grad()
    def _compare(
        self, masked: nn.Module, small: nn.Module, in_double: bool
    ) -> str | None:
        # The masked copy runs first: its errors are those of the model or of the call.
        expected = run(masked, self._forward, in_double=in_double)
        if self._leaky and in_double and not _is_finite(expected):
            return None
        try:
            outputs = run(small, self._forward, in_double=in_double)
        except Exception as error:  # any error here means that the groups are wrong
            return error_line(error)
        try:
            worst = difference(expected, outputs)
        except ValueError:
            return 'another number of outputs'
        if worst == float('inf'):
            return 'outputs differ in shape, or are not finite'
        return None if worst <= TOLERANCE else f'outputs differ by {worst:.2g}'


def _is_finite(outputs: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in tree_tensors(outputs))
