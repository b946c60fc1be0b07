"""The teacher: the unpruned model of a run, as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmgfp.engine.deploy import load_strictly, load_training_checkpoint
from mmgfp.engine.model_building import build_model
from mmgfp.engine.registry import is_named
from mmgfp.utils.errors import ConfigError

#: What a data preprocessor does to images.
NORMALISATION = ('mean', 'std', '_channel_conversion')


def build_teacher(cfg: Config, teacher: Any, checkpoint: str) -> nn.Module:
    """Build a teacher in eval mode, of which nothing needs gradients.

    Args:
        cfg: The config of the run.
        teacher: A config file or a config with a ``model``, or the config of the model
            itself; None for the run's own model as it is before pruning.
        checkpoint: A file or an address of its weights.

    Raises:
        ConfigError: If the config has no model.
        StructureError: If the weights are damaged, or not those of the model.
    """
    model = build_model(_teacher_config(cfg, teacher))
    if '://' in checkpoint:
        raw = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    else:
        raw = load_training_checkpoint(Path(checkpoint))
    load_strictly(model, raw.get('state_dict', raw), Path(checkpoint))
    model.eval()
    model.requires_grad_(False)
    return model


def _teacher_config(cfg: Config, teacher: Any) -> Config:
    if isinstance(teacher, str):
        teacher = Config.fromfile(teacher).to_dict()
    if teacher is None:
        teacher = {'model': cfg.get('model')}
        if is_named((teacher['model'] or {}).get('type'), 'PrunedModel'):
            teacher['model'] = teacher['model']['architecture']
    given = dict(teacher) if 'model' in teacher else {'model': teacher}
    names = ('default_scope', 'data_preprocessor')
    own = {name: cfg[name] for name in names if name in cfg}
    entries = own | {name: given[name] for name in (*names, 'model') if name in given}
    if entries['model'] is None:
        del entries['model']
    return Config(entries)


def check_same_images(student: Any, teacher: Any) -> None:
    """Refuse a teacher that was trained on images prepared in another way.

    Raises:
        ConfigError: If mean, deviation or the order of channels differ.
    """
    for name in NORMALISATION:
        ours, theirs = (
            _plain(getattr(getattr(model, 'data_preprocessor', None), name, None))
            for model in (student, teacher)
        )
        if ours != theirs:
            raise ConfigError(
                f'data_preprocessor.{name.strip("_")} of the teacher',
                f'as in the model, {ours}, as it sees the same images',
                str(theirs),
                'train both with one data_preprocessor',
            )


def _plain(value: Any) -> Any:
    return value.flatten().tolist() if isinstance(value, Tensor) else value
