"""1x1 convolutions from a student's features to the widths of its teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mmgfp.engine.distillation.losses import feature_distance
from mmgfp.utils.errors import ConfigError

#: Version of the entry that `Adapters.to_dict` gives.
VERSION = 1


class Adapters:
    """Distances of features, through convolutions that are trained where widths differ.

    They belong to the hook: the model's ``state_dict`` does not have them. The
    optimizer does, beside the parameters of its group with the largest learning rate.

    Args:
        widths: Channels of student and teacher at each level.
        optimizer: The optimizer of the run.
        device: Where the features are.
    """

    def __init__(
        self, widths: Sequence[Sequence[int]], optimizer: Optimizer, device: Any
    ) -> None:
        self.widths = [(int(ours), int(theirs)) for ours, theirs in widths]
        self.module = nn.ModuleList(
            nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1)
            for ours, theirs in self.widths
        ).to(device)
        parameters = list(self.module.parameters())
        if parameters:
            # In place, as schedulers and some optimizers hold on to the lists.
            _main_group(optimizer)['params'].extend(parameters)
        self._run: nn.Module = _Levels(self.module)
        if parameters and get_world_size() > 1:
            self._run = DistributedDataParallel(self._run)

    def distance(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """Return the mean distance over levels of (N, C, H, W) features, a scalar."""
        adapted = self._run(list(ours))
        pairs = zip(adapted, theirs, strict=True)
        return torch.stack([feature_distance(a, b) for a, b in pairs]).mean()

    def to_dict(self) -> dict[str, Any]:
        """Return plain types and tensors on the CPU, as a checkpoint holds them."""
        return {
            'version': VERSION,
            'widths': [list(pair) for pair in self.widths],
            'weights': {n: t.cpu() for n, t in self.module.state_dict().items()},
        }

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], optimizer: Optimizer, device: Any
    ) -> Adapters:
        """Go on with adapters of an interrupted run, before its optimizer is loaded.

        Raises:
            ConfigError: If ``raw`` is damaged or of another version.
        """
        try:
            if raw['version'] != VERSION:
                raise ValueError(f'version {raw["version"]!r}')
            adapters = cls(raw['widths'], optimizer, device)
            adapters.module.load_state_dict(raw['weights'])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                'checkpoint: distillation',
                f'adapters of version {VERSION}',
                ' '.join(str(error).split())[:200],
                'resume with the version of mmgfp that the run was started with',
            ) from error
        return adapters


class _Levels(nn.Module):
    """Runs each layer on features of its level, as one module for several processes."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [f(x) for f, x in zip(self.layers, features, strict=True)]


def _main_group(optimizer: Optimizer) -> dict[str, Any]:
    """Return the group with the largest learning rate, the first of several."""

    def rates(group: dict[str, Any]) -> tuple[float, float]:
        rate = group.get('initial_lr', group.get('lr', 0.0))
        return float(rate), float(group.get('weight_decay', 0.0))

    return max(optimizer.param_groups, key=rates)
