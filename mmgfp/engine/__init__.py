"""MMEngine's side: the hook, the model factory, registries, artefacts."""

from mmgfp.engine.hooks.pruning import FisherPruningHook
from mmgfp.engine.pruned_model import PrunedModel
from mmgfp.engine.registry import PRUNERS

__all__ = ['PRUNERS', 'FisherPruningHook', 'PrunedModel']
