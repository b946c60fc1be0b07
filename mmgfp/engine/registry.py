"""Registries in the scope ``mmgfp``, which are filled on first use.

Importing this module imports none of the classes, because MMEngine's hooks bring OpenCV
along and many users of `mmgfp` need neither.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmgfp',
    locations=[
        'mmgfp.engine.hooks.distillation',
        'mmgfp.engine.hooks.exact_resume',
        'mmgfp.engine.hooks.pruning',
        'mmgfp.engine.hooks.sparsity',
    ],
)
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmgfp',
    locations=['mmgfp.engine.pruned_model'],
)


def _forward(registry: Registry, name: str) -> None:
    """Let every scope build ``name`` of ``registry`` without the prefix ``mmgfp.``."""

    def build(*args: Any, **kwargs: Any) -> Any:
        # Not through `Registry.build`, which would switch to the default scope and come
        # back here.
        return registry.get(name)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    registry.parent.register_module(name=name, module=build)


#: Hooks that prune.
PRUNING_HOOKS = ('ChannelPruningHook', 'FisherPruningHook')
#: Hooks that concern training alone: a deployed model goes without.
TRAINING_HOOKS = (*PRUNING_HOOKS, 'DistillationHook', 'SparsityHook')
for _name in ('ExactResumeHook', *TRAINING_HOOKS):
    _forward(HOOKS, _name)
_forward(MODELS, 'PrunedModel')


def is_named(kind: Any, *names: str) -> bool:
    """Return whether the ``type`` in a config means one of ``names`` in this scope.

    Examples:
        >>> [is_named(kind, 'PrunedModel') for kind in ('mmgfp.PrunedModel', 'ResNet')]
        [True, False]
    """
    return any(kind in (name, f'mmgfp.{name}') for name in names)
