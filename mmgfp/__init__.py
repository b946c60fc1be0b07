"""mmgfp: Group Fisher Pruning for OpenMMLab (arXiv 2108.00708).

``custom_imports = dict(imports=['mmgfp'])`` in a config registers the hook, the model
factory and the demo dataset. Without MMEngine, `GroupFisherPruner` works on its own.
"""

import importlib.util

from mmgfp.pruner import GroupFisherPruner
from mmgfp.surgery.compact import compact, compact_
from mmgfp.surgery.structure import PruneStructure
from mmgfp.version import __version__

__all__ = ['GroupFisherPruner', 'PruneStructure', '__version__', 'compact', 'compact_']

if importlib.util.find_spec('mmengine') is not None:
    from mmgfp.engine import PRUNERS, FisherPruningHook, PrunedModel

    __all__ += ['PRUNERS', 'FisherPruningHook', 'PrunedModel']
if importlib.util.find_spec('mmdet') is not None:
    from mmgfp.demo import DigitsDetection

    __all__ += ['DigitsDetection']
