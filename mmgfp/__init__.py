"""mmgfp: Group Fisher Pruning for OpenMMLab (arXiv 2108.00708).

``custom_imports = dict(imports=['mmgfp'])`` in a config registers `FisherPruningHook`,
`SparsityHook`, `DistillationHook`, `ExactResumeHook` and `PrunedModel`. Without
MMEngine, `GroupFisherPruner` works on its own.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from mmgfp.config import PruningConfig
from mmgfp.pruner import ChannelPruner, GroupFisherPruner
from mmgfp.surgery.compact import compact, compact_
from mmgfp.surgery.structure import PruneStructure
from mmgfp.version import __version__

__all__ = [
    'ChannelPruner',
    'GroupFisherPruner',
    'PruneStructure',
    'PruningConfig',
    '__version__',
    'compact',
    'compact_',
]

if importlib.util.find_spec('mmengine') is not None:
    importlib.import_module('mmgfp.engine.registry')
    __all__ += ['ChannelPruningHook', 'DistillationHook', 'ExactResumeHook']
    __all__ += ['FisherPruningHook', 'PrunedModel', 'SparsityHook']

if TYPE_CHECKING:
    from mmgfp.engine.hooks.distillation import DistillationHook
    from mmgfp.engine.hooks.exact_resume import ExactResumeHook
    from mmgfp.engine.hooks.pruning import ChannelPruningHook, FisherPruningHook
    from mmgfp.engine.hooks.sparsity import SparsityHook
    from mmgfp.engine.pruned_model import PrunedModel
else:
    # Imported on first use: MMEngine's hooks bring OpenCV along.
    _LAZY = {
        'ChannelPruningHook': 'mmgfp.engine.hooks.pruning',
        'DistillationHook': 'mmgfp.engine.hooks.distillation',
        'ExactResumeHook': 'mmgfp.engine.hooks.exact_resume',
        'FisherPruningHook': 'mmgfp.engine.hooks.pruning',
        'PrunedModel': 'mmgfp.engine.pruned_model',
        'SparsityHook': 'mmgfp.engine.hooks.sparsity',
    }

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        return getattr(importlib.import_module(_LAZY[name]), name)
