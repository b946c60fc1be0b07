"""Models of a config, built without pretrained weights."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmgfp.engine.config_search import dicts_in, scope_of
from mmgfp.utils.errors import ConfigError


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model without looking for pretrained weights.

    Args:
        cfg: A config with a model; it is left as it is.

    Raises:
        ConfigError: If the config has no model.

    Examples:
        >>> backbone = dict(depth=18, base_channels=4, norm_cfg=dict(type='SyncBN'))
        >>> backbone.update(type='mmpretrain.ResNet', stem_channels=4)
        >>> model = build_model(Config(dict(model=backbone)))
        >>> type(model).__name__, type(model.bn1).__name__
        ('ResNet', 'BatchNorm2d')
    """
    if 'model' not in cfg:
        raise ConfigError('config', 'a model', 'none', 'give a model config')
    init_default_scope(scope_of(cfg) or 'mmengine')
    model_cfg = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:  # as the runner does
        model_cfg.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    for node in dicts_in(model_cfg):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and 'checkpoint' in init_cfg:  # of any type
            node['init_cfg'] = None
        for key in ('teacher_ckpt', 'pretrained'):
            if isinstance(node.get(key), str):
                node[key] = None
        if node.get('type') in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'  # the same weights, and no need of several GPUs
    model = MODELS.build(model_cfg)
    # Not chained: train() returns nothing where distillation overrides it.
    model.train()
    return model


def init_weights(model: Any) -> None:
    """Initialise weights as their config says, without a log of each one."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    model.init_weights()
    logger.setLevel(level)
