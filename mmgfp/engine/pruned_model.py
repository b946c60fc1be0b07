"""The model factory with which a config describes a pruned model."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmgfp.engine.initial_weights import (
    RunStart,
    WidthGuard,
    forget_pretrained,
    reset_parameters,
    rewind,
)
from mmgfp.engine.registry import MODELS
from mmgfp.surgery.compact import compact_
from mmgfp.surgery.fit import check_fits
from mmgfp.surgery.structure import PruneStructure
from mmgfp.utils.errors import ConfigError

#: Where weights of the compact model may come from.
INITS = ('pruned', 'original', 'scratch')


@MODELS.register_module()
def PrunedModel(  # noqa: N802
    architecture: dict,
    structure: str,
    init: str = 'pruned',
    original: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build ``architecture`` and shrink it to ``structure``.

    The model is of the architecture's own class, with fewer channels: checkpoints keep
    their keys and every tool works on it.

    Args:
        architecture: The model's config as it was before pruning.
        structure: A ``.json`` file or a checkpoint that holds the structure.
        init: What training starts from: ``'pruned'``, the weights that ``load_from``
            names; ``'original'``, the kept channels of the weights in ``original``
            ("rewinding", Frankle and Carbin 2019, arXiv 1803.03635); ``'scratch'``,
            new random ones (Liu et al. 2019, arXiv 1810.05270). With the latter two, a
            run that has a ``load_from`` and does not resume is refused.
        original: A checkpoint of the unpruned model, for ``init='original'``. It is
            read when the weights are initialised, not to test or to deploy.
        overrides: Further fields, merged into ``architecture``. A
            ``backbone=dict(init_cfg=None)`` is useful: weights of the original size
            are not looked for, and `mmdet.apis.init_detector` reads that field.

    Raises:
        ConfigError: If ``init`` is something else, or ``original`` does not go with it.
        StructureError: If the file is damaged, or does not belong to the architecture.
    """
    _check_init(init, original)
    loaded = PruneStructure.load(structure)
    config = Config(copy.deepcopy(dict(architecture)))
    config.merge_from_dict(overrides)
    model = MMENGINE_MODELS.build(config._cfg_dict)
    check_fits(loaded, model, structure)
    forget_pretrained(model)
    compact_(model, loaded)
    if init == 'scratch':
        reset_parameters(model)
    if init != 'pruned':
        model.register_load_state_dict_pre_hook(RunStart(init))
    if original is not None:
        rewind(model, loaded, original)
    model.register_load_state_dict_pre_hook(WidthGuard(loaded))
    return model


def _check_init(init: str, original: str | None) -> None:
    """Refuse an unknown ``init``, and ``original`` without a use for it.

    Raises:
        ConfigError: If there is one.
    """
    if init not in INITS:
        expected = f'one of {", ".join(INITS)}'
        raise ConfigError('model.init', expected, repr(init), 'name one of them')
    if (original is None) == (init == 'original'):
        raise ConfigError(
            'model.original',
            "given with init='original' and with no other",
            f'{original!r} with init={init!r}',
            'name a checkpoint of the unpruned model there, or drop it',
        )
