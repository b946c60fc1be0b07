"""What a file says about itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mmengine.config import Config
from torch import nn

from mmgfp.engine.artifact import plain
from mmgfp.engine.config_search import scope_of
from mmgfp.engine.deploy import Trained
from mmgfp.export.options import ExportOptions
from mmgfp.export.preprocess import Preprocessing
from mmgfp.surgery.structure import PruneStructure
from mmgfp.version import __version__

#: The key under which a file holds a JSON text.
KEY = 'mmgfp'


def task_of(cfg: Config, model: nn.Module) -> str:
    """Return 'classification', 'instance' for instance segmentation, or 'detection'."""
    if scope_of(cfg) == 'mmpretrain':
        return 'classification'
    with_mask = getattr(model, 'with_mask', False)
    return 'instance' if with_mask else 'detection'


def metadata_of(
    cfg: Config, trained: Trained, prep: Preprocessing, options: ExportOptions
) -> dict[str, str]:
    """Return the texts that go into a file, by key.

    Args:
        cfg: The model's config.
        trained: The model with its structure.
        prep: How images are prepared.
        options: How the file is made.
    """
    data = {
        'task': task_of(cfg, trained.model),
        'outputs': options.outputs,
        'preprocess': options.preprocess,
        'classes': _classes(cfg, trained.meta),
        'mean': prep.mean,
        'std': prep.std,
        'bgr_to_rgb': prep.bgr_to_rgb,
        'channel_order': prep.channel_order,
        'input_size': prep.input_size,
        'keep_ratio': prep.keep_ratio,
        'pad_size_divisor': prep.pad_size_divisor,
        'pad_value': prep.plain_pad_value(),
        'structure': trained.structure and structure_hash(trained.structure),
        'mmgfp': __version__,
    }
    return {KEY: json.dumps(plain(data))}


def structure_hash(structure: PruneStructure) -> str:
    """Return 16 hexadecimal digits that tell structures apart."""
    text = json.dumps(structure.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _classes(cfg: Config, meta: dict[str, Any]) -> list[str]:
    """Return names of classes as the checkpoint or the test dataset has them."""
    recorded = meta.get('dataset_meta')
    loader = cfg.get('test_dataloader') or {}
    declared = (loader.get('dataset') or {}).get('metainfo')
    for known in (recorded, declared):
        if isinstance(known, dict):
            names = known.get('classes') or known.get('CLASSES')
            if isinstance(names, list | tuple):
                return [str(name) for name in names]
    return []
