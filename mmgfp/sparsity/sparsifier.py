"""Weights that are held at zero while an optimizer trains the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmgfp.sparsity.config import SparsityConfig
from mmgfp.sparsity.layers import select_weights
from mmgfp.sparsity.masks import keep_largest
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.plain import plain, same, short
from mmgfp.utils.validation import refuse_copy

#: Version of the state that `Sparsifier.state_dict` gives.
VERSION = 1
REMEDY = 'resume with the configuration that the run was started with'


class Sparsifier(ABC):
    """Sets weights of a model to zero and holds them there.

    The model keeps its modules and its keys: between two steps of the optimizer, its
    parameters are the sparse weights themselves.

    Args:
        model: The model, changed in place.
        config: The options of the run.

    Attributes:
        weights: Weights that take part, by name.
        left_out: Why the others do not, by layer.
        masks: Which entries of each weight stay.
        begun: Whether any were chosen yet.

    Raises:
        ConfigError: If the model has no weights that can be set to zero, or ``keep``
            names none.
    """

    #: Whether gradients must be there before a step begins.
    needs_gradients: ClassVar[bool] = False

    def __init__(self, model: nn.Module, config: SparsityConfig) -> None:
        multiple = config.m if config.kind == 'nm' else None
        selection = select_weights(model, config.keep, multiple)
        self.config = config
        self.weights, self.left_out = selection.weights, selection.left_out
        self.masks = {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self.weights.items()
        }
        self.begun = False
        #: Whether the optimizer leaves out the step that it is at.
        self._skips = False
        self._copies: list[dict[str, Tensor]] = []
        self._handles: list[Any] = []

    @abstractmethod
    def choose(self, density: float) -> dict[str, Tensor]:
        """Return masks with this share of the weights."""

    def before_step(self, scale: float) -> None:  # noqa: B027
        """Get weights and gradients ready for a step of the optimizer.

        Args:
            scale: The factor that gradients still have, 1 in most runs.
        """

    @torch.no_grad()
    def after_step(self) -> None:
        """Set masked weights to zero, where the optimizer may have moved them."""
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0)

    @torch.no_grad()
    def decide(self, density: float) -> None:
        """Choose the weights that stay, and set the others to zero.

        Args:
            density: The share that stays, in (0, 1].

        Raises:
            StatisticsError: If weights or scores are not finite.
        """
        self.masks.update(self.choose(density))  # in place, as hooks hold on to it
        self.begun = True
        self.after_step()
        self.mask_copies()

    def attach(self, optimizer: Optimizer) -> None:
        """Hold zeros through the steps of the optimizer that trains the model."""
        self.close()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.needs_gradients and any(callable(x) for x in (*args, *kwargs.values())):
            raise ConfigError(
                'kind',
                "'magnitude' for an optimizer that computes gradients itself",
                f'{self.config.kind!r} and a closure for {type(optimizer).__name__}',
                'use SGD, Adam or their like',
            )
        # Fused optimizers undo the scale of the loss, and skip a step, by themselves.
        scale = getattr(optimizer, 'grad_scale', None)
        overflow = getattr(optimizer, 'found_inf', None)
        self._skips = overflow is not None and bool(overflow)
        if not self._skips:
            self.before_step(1.0 if scale is None else float(scale))

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.begun and not self._skips:
            self.after_step()

    def track_copy(self, copied: nn.Module) -> None:
        """Let a copy with the same tensors, such as an average, have the same zeros."""
        parameters = dict(copied.named_parameters())
        self._copies.append({name: parameters[name] for name in self.weights})

    @torch.no_grad()
    def mask_copies(self) -> None:
        """Set masked weights of copies to zero."""
        for copied in self._copies:
            for name, weight in copied.items():
                weight.masked_fill_(~self.masks[name], 0)

    def close(self) -> None:
        """Take the hooks off; zeros stay until the next step of an optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    __reduce_ex__ = refuse_copy

    def kept_bits(self) -> np.ndarray:
        """Return which weights stay, of all layers in turn, (W,)."""
        masks = [self.masks[name].reshape(-1).cpu() for name in self.weights]
        return torch.cat(masks).numpy()

    def report(self) -> dict[str, Any]:
        """Return how many weights stay, in all and by layer, in plain types."""
        layers = {name.removesuffix('.weight'): name for name in self.weights}
        sizes = {layer: self.weights[name].numel() for layer, name in layers.items()}
        kept = {layer: int(self.masks[name].sum()) for layer, name in layers.items()}
        total, remaining = sum(sizes.values()), sum(kept.values())
        return {
            'kind': self.config.kind,
            'weights': total,
            'kept': remaining,
            'density': remaining / total,
            'layers': {
                name: {'weights': n, 'kept': kept[name], 'density': kept[name] / n}
                for name, n in sizes.items()
            },
            'left_out': dict(self.left_out),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights, in plain types."""
        return {
            'version': VERSION,
            'options': plain(asdict(self.config)),
            'begun': self.begun,
            'masks': {
                name: torch.from_numpy(np.packbits(mask.cpu().numpy()))
                for name, mask in self.masks.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the masks of an interrupted run, with its weights or before.

        Raises:
            ConfigError: If the state is damaged, of another version, of another model
                or of other options.
        """
        version = state.get('version') if isinstance(state, Mapping) else None
        if version != VERSION:
            raise ConfigError(
                'checkpoint',
                f'a state of sparsity of version {VERSION}',
                f'version {version!r}',
                'start anew from the weights, with load_from',
            )
        try:
            for name, value in asdict(self.config).items():
                if not same(state['options'][name], value):
                    got = short(state['options'][name])
                    raise ConfigError(name, got, short(value), REMEDY)
            self._read(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            got = f'{type(error).__name__}: {error}'
            expected = 'a state of sparsity of this model'
            raise ConfigError('checkpoint', expected, got, REMEDY) from error

    def _read(self, state: Mapping[str, Any]) -> None:
        if state['masks'].keys() != self.weights.keys():
            raise ValueError('masks of other weights')
        for name, weight in self.weights.items():
            packed = state['masks'][name].cpu().numpy()
            if packed.shape != (-(-weight.numel() // 8),):
                raise ValueError(f'a mask of another size for {name}')
            bits = np.unpackbits(packed, count=weight.numel()).astype(bool)
            mask = torch.from_numpy(bits).reshape(weight.shape)
            self.masks[name] = mask.to(weight.device)
        self.begun = bool(state['begun'])


class FixedZeros(Sparsifier):
    """Weights that were set to zero stay so for good, like those of pruned channels."""

    def attach(self, optimizer: Optimizer) -> None:
        """Hold zeros through the steps of the optimizer, and in gradients."""
        super().attach(optimizer)
        for name, weight in self.weights.items():
            hook = _zero_gradient(self.masks, name)
            handle = weight.register_post_accumulate_grad_hook(hook)
            self._handles.append(handle)


def _zero_gradient(masks: dict[str, Tensor], name: str) -> Any:
    """Return a hook that clears gradients of masked weights before they are clipped.

    It holds on to the masks alone, as torch never frees a cycle through a parameter.
    """

    def hook(weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.masked_fill_(~masks[name], 0)

    return hook


class KeptAside(Sparsifier):
    """Weights that are zero have values that are kept aside, and may come back.

    Attributes:
        aside: Values of masked weights; entries that are not masked mean nothing.
    """

    needs_gradients = True

    def __init__(self, model: nn.Module, config: SparsityConfig) -> None:
        super().__init__(model, config)
        self.aside = {n: w.detach().clone() for n, w in self.weights.items()}

    def dense(self, name: str) -> Tensor:
        """Return a weight with the values that are kept aside."""
        weight = self.weights[name].detach()
        return torch.where(self.masks[name], weight, self.aside[name])

    @torch.no_grad()
    def decide(self, density: float) -> None:
        """Choose the weights that stay, and set the others to zero."""
        dense = {name: self.dense(name) for name in self.weights}
        self.masks.update(self.choose(density))
        self.begun = True
        for name, weight in self.weights.items():
            self.aside[name] = dense[name]
            weight.copy_(dense[name]).masked_fill_(~self.masks[name], 0)
        self.mask_copies()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights, in plain types."""
        aside = {n: v[~self.masks[n]].cpu() for n, v in self.aside.items()}
        return super().state_dict() | {'aside': aside}

    def _read(self, state: Mapping[str, Any]) -> None:
        super()._read(state)
        for name, weight in self.weights.items():
            values = state['aside'][name].to(weight)
            self.aside[name] = torch.zeros_like(weight.detach())
            self.aside[name][~self.masks[name]] = values


def largest_of(
    scores: Mapping[str, Tensor], density: float, scope: str
) -> dict[str, Tensor]:
    """Return masks of the largest scores.

    Args:
        scores: Scores of weights, by name.
        density: The share that stays, rounded to whole weights.
        scope: ``'global'`` for a share of all, ``'local'`` for one of each weight.
    """
    tensors = list(scores.values())
    groups = [tensors] if scope == 'global' else [[t] for t in tensors]
    masks = []
    for group in groups:
        count = round(density * sum(t.numel() for t in group))
        masks += keep_largest(group, count)
    return dict(zip(scores, masks, strict=True))
