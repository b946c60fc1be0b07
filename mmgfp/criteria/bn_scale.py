"""Scales of norms: network slimming (Liu et al. 2017, arXiv 1708.06519)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mmgfp.criteria.base import CRITERIA, ScoringContext
from mmgfp.criteria.unit_weights import UnitWeights, WeightCriterion
from mmgfp.groups import Member, module_of
from mmgfp.tracing import RowUse
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check

#: Modules whose weight scales channels that they have normalised.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@CRITERIA.register('bn_scale')
class BNScale(WeightCriterion):
    """Sum of the absolute scales of the norms that a unit's channels go through.

    Groups without such a norm are left alone.

    Args:
        sparsity: Factor of the paper's L1 term on these scales while the model trains
            (lambda; the paper uses 1e-5 to 1e-4); 0 for none. Its subgradient joins
            the gradients when an optimizer steps: behind accumulation, clipping,
            scaling of the loss and the mean over processes, like weight decay.
    """

    why_unknown = 'has no norm with scales, or they are not finite,'

    def __init__(self, sparsity: float = 0.0) -> None:
        super().__init__()
        is_number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
        is_valid = is_number and 0 <= sparsity < float('inf')
        check('sparsity', is_valid, 'a number of at least 0', sparsity)
        self.sparsity = sparsity
        self._scales: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._stepping: Any = None  # the optimizer that steps; it may wrap another one

    def unscorable(
        self, model: nn.Module, weights: Sequence[str], rows: RowUse
    ) -> Mapping[str, str]:
        """Return nothing, as all that is needed is behind the layers.

        Raises:
            ConfigError: If no norm has scales.
        """
        if not any(_has_scale(module) for module in model.modules()):
            raise ConfigError(
                'criterion',
                'one that the model has something for',
                'bn_scale for a model in which no norm has scales',
                "use another one, such as 'l1'",
            )
        return {}

    def find_weights(self, context: ScoringContext) -> UnitWeights:
        """Return the scales of norms."""

        def is_scale(member: Member) -> bool:
            module, attribute = module_of(member.name), member.name.rpartition('.')[2]
            is_weight = member.role == 'with' and attribute == 'weight'
            return is_weight and _has_scale(context.model.get_submodule(module))

        return UnitWeights(context, is_scale)

    def attach(self, context: ScoringContext) -> None:
        """Find the scales in the model as it is now, and let them be penalised."""
        super().attach(context)
        assert self.weights is not None
        self._scales = list(self.weights.parameters().values())
        if self.sparsity and not self._handles:
            # Weakly, as torch would keep the model alive by a pruner nobody closes.
            before = weakref.WeakMethod(self._before_step)
            after = weakref.WeakMethod(self._after_step)
            self._handles = [
                register_optimizer_step_pre_hook(_forward_to(before)),
                register_optimizer_step_post_hook(_forward_to(after)),
            ]

    def detach(self) -> None:
        """Penalise no scales any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch(self, active: bool) -> None:
        """Take in that an iteration begins: no optimizer steps."""
        self._stepping = None

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is not None:
            return
        self._stepping = optimizer
        trained = {id(p) for group in optimizer.param_groups for p in group['params']}
        scales = [s for s in self._scales if id(s) in trained and s.grad is not None]
        if scales and any(callable(x) for x in (*args, *kwargs.values())):
            raise ConfigError(
                'sparsity',
                '0 for an optimizer that computes gradients itself',
                f'{self.sparsity} and a closure for {type(optimizer).__name__}',
                'use SGD, Adam or their like',
            )
        # Fused optimizers undo the scale of the loss only later.
        scale = getattr(optimizer, 'grad_scale', None)
        for parameter in scales:
            term = parameter.sign() * self.sparsity
            term = term if scale is None else term * scale.to(term.device)
            parameter.grad.add_(term)  # type: ignore[union-attr]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping is optimizer:
            self._stepping = None

    def measure(self, vectors: Tensor) -> Tensor:
        """Return the sums of absolute scales, (units,)."""
        return vectors.abs().sum(1, dtype=torch.float64)


def _has_scale(module: nn.Module) -> bool:
    return isinstance(module, NORMS) and isinstance(module.weight, nn.Parameter)


def _forward_to(method: weakref.WeakMethod) -> Any:
    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        call = method()
        if call is not None:
            call(optimizer, args, kwargs)

    return hook
