"""What the configs that `tools/prune.py` writes start from, and whether it will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.config import PruningConfig
from mmgfp.engine.registry import PRUNING_HOOKS
from mmgfp.selection.targets import parse_targets
from mmgfp.utils.errors import ConfigError


@dataclass(frozen=True)
class Sources:
    """The start of the configs of pruning and fine-tuning.

    Attributes:
        config: The config that trained the model, a path or ``library::path``.
        checkpoint: Its weights; None if the model is trained first.
        options: Config entries that override it, as the command line parses them.
        work_dir: The folder of the run, which gets the configs.
        pruning: Options of the pruning hook.
        epochs: Passes over the training data of fine-tuning; None for as many as the
            config trains.
    """

    config: str
    checkpoint: str | None
    options: Mapping[str, Any]
    work_dir: Path
    pruning: Mapping[str, Any]
    epochs: int | None = None

    @property
    def prune(self) -> Path:
        """The config that prunes."""
        return self.work_dir / f'{self._stem}_prune.py'

    @property
    def finetune(self) -> Path:
        """The config that fine-tunes."""
        return self.work_dir / f'{self._stem}_finetune.py'

    @property
    def flat(self) -> Path:
        """The config that trained the model in one text, where others need it so."""
        return self.work_dir / f'{self._stem}_base.py'

    @property
    def _stem(self) -> str:
        return Path(self.config).stem

    @property
    def pruned(self) -> Path:
        """The file that pruning is expected to write last."""
        target = parse_targets(self.pruning['target'])[-1]
        return self.work_dir / 'prune' / f'{self.prune.stem}_{target.label}.pth'


def check_unpruned(cfg: Config, name: str) -> None:
    """Refuse a config that prunes, or is of a pruned model.

    Raises:
        ConfigError: If it is one, or its hooks are no list of dicts.
    """
    hooks = cfg.get('custom_hooks') or []
    is_list = isinstance(hooks, list | tuple)
    if not is_list or not all(isinstance(hook, Mapping) for hook in hooks):
        raise ConfigError(
            'custom_hooks', "a list of dicts with a 'type'", repr(hooks), f'edit {name}'
        )
    names = [name_of(hook.get('type')) for hook in hooks]
    hooks = [name for name in names if name in PRUNING_HOOKS]
    if name_of((cfg.get('model') or {}).get('type')) == 'PrunedModel':
        hooks = ['a PrunedModel']
    if hooks:
        raise ConfigError(
            'CONFIG',
            'the one that trained the model before it was pruned',
            f'{name} with {hooks[0]}',
            'give that, or your own two by --prune-config and --finetune-config',
        )


def check_pruning(options: Mapping[str, Any]) -> None:
    """Check options of the pruning hook; a latency profile may yet have to be measured.

    Raises:
        ConfigError: If one is not valid.
    """
    checked = dict(options)
    parse_targets(checked['target'])
    if needs_profile(checked) and not Path(checked['latency_profile']).is_file():
        for name in ('target', 'normalize', 'latency_profile'):
            checked.pop(name, None)
    PruningConfig.for_runner(**checked)


def needs_profile(options: Mapping[str, Any]) -> bool:
    """Return whether latency is a cost of a run with these options."""
    names = {t.cost for t in parse_targets(options['target'])}
    return 'latency' in names | {options.get('normalize')}


def name_of(kind: Any) -> str:
    """Return the last part of the name of a ``type``, a text or a class."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]
