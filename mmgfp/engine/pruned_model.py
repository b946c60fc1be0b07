"""The model factory with which a config describes a pruned model."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmgfp.engine.registry import MODELS
from mmgfp.surgery.compact import compact_
from mmgfp.surgery.fit import check_fits, check_shapes
from mmgfp.surgery.structure import PruneStructure


@MODELS.register_module()
def PrunedModel(architecture: dict, structure: str, **overrides: Any) -> nn.Module:  # noqa: N802
    """Build ``architecture`` and shrink it to ``structure``.

    The model is of the architecture's own class, with fewer channels: checkpoints keep
    their keys and every tool works on it.

    Args:
        architecture: The model's config as it was before pruning.
        structure: A ``.json`` file or a checkpoint that holds the structure.
        overrides: Further fields, merged into ``architecture``. A
            ``backbone=dict(init_cfg=None)`` is useful: weights of the original size
            are not looked for, and `mmdet.apis.init_detector` reads that field.

    Raises:
        StructureError: If the file is damaged, or does not belong to the architecture.
    """
    loaded = PruneStructure.load(structure)
    config = Config(copy.deepcopy(dict(architecture)))
    config.merge_from_dict(overrides)
    model = MMENGINE_MODELS.build(config._cfg_dict)
    check_fits(loaded, model, structure)
    _forget_pretrained(model)
    compact_(model, loaded)
    model.register_load_state_dict_pre_hook(WidthGuard(loaded))
    return model


class WidthGuard:
    """Refuse weights of other widths whenever a model loads weights.

    Args:
        structure: The structure that the model was shrunk to.
    """

    def __init__(self, structure: PruneStructure) -> None:
        self.shapes = {name: structure.shape(name) for name in structure.kept}

    def __call__(
        self, module: nn.Module, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        """Check the weights that are about to be loaded.

        Raises:
            StructureError: If a tensor has another shape than the structure says.
        """
        check_shapes(
            {n: state_dict.get(prefix + n) for n in self.shapes},
            self.shapes,
            'as model.structure says',
            'give the checkpoint that was saved with this structure',
        )


def _forget_pretrained(model: nn.Module) -> None:
    """Keep ``init_weights`` from looking for weights of the original widths."""
    for name, module in model.named_modules():
        init_cfg = getattr(module, 'init_cfg', None)
        entries = init_cfg if isinstance(init_cfg, list) else [init_cfg]
        if any(isinstance(e, dict) and e.get('type') == 'Pretrained' for e in entries):
            print_log(f'{name} of the pruned model ignores its pretrained weights')
            module.init_cfg = None
