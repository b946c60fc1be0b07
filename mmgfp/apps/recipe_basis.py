"""What the configs of pruning and of fine-tuning have in common."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.apps.cli import load_config
from mmgfp.apps.config_text import Entry, changes, merged
from mmgfp.apps.recipe_sources import Sources, check_unpruned
from mmgfp.apps.training_length import length_of


class RecipeBasis:
    """The config that trained the model, and what others inherit from it.

    Args:
        sources: What was given.

    Attributes:
        cfg: The config with the overrides of the command line.
        given: What these have changed.
        length: How long it trains.

    Raises:
        ConfigError: If the config is of pruning already, or cannot train.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._original = load_config(sources.config)
        cfg = load_config(sources.config, dict(sources.options))
        check_unpruned(cfg, sources.config)
        # Names in place of classes, which some configs import.
        self.cfg = Config(cfg.to_dict(), filename=cfg.filename)
        self.given = changes(self._original.to_dict(), self.cfg.to_dict())
        self.length = length_of(copy.deepcopy(self.cfg))  # which completes it

    @property
    def trained(self) -> str:
        """The file that training writes last."""
        length = self.length
        epochs = f'epoch_{length.iterations // length.epoch}'
        name = epochs if length.by_epoch else f'iter_{length.iterations}'
        return str(self.sources.work_dir / 'baseline' / f'{name}.pth')

    @property
    def finetuning(self) -> int:
        """Iterations of fine-tuning."""
        return self.length.iterations_for(self.sources.epochs)

    @property
    def hooks(self) -> list[dict[str, Any]]:
        """The hooks of the config."""
        return list(self.cfg.get('custom_hooks') or [])

    @property
    def checkpoint_hook(self) -> Mapping[str, Any]:
        """The hook of the config that saves."""
        return (self.cfg.get('default_hooks') or {}).get('checkpoint') or {}

    @property
    def needs_flat(self) -> bool:
        """Whether the config imports what it names: no plain one can inherit it."""
        config = self.sources.config
        return '::' not in config and Config._is_lazy_import(config)

    @property
    def flat_text(self) -> str:
        """The config in plain text, as it was before any override."""
        title = f'# {self.sources.config} in the style of the configs that inherit it.'
        return f'{title}\n{self._original.pretty_text}'

    def base(self) -> str:
        """Return the user's config as `_base_` names it."""
        config = self.sources.config
        if '::' in config:
            return config
        if self.needs_flat:
            return f'./{self.sources.flat.name}'
        path = Path(os.path.relpath(config, self.sources.work_dir))
        # Not so where '..' of a link leads to what is above the folder that it names.
        is_there = (self.sources.work_dir / path).resolve() == Path(config).resolve()
        return (path if is_there else Path(config).absolute()).as_posix()

    def start(self) -> list[Entry]:
        """Return the entries that both configs begin with."""
        imports = (self.cfg.get('custom_imports') or {}).get('imports') or []
        imports = [imports] if isinstance(imports, str) else list(imports)
        names = list(dict.fromkeys([*imports, 'mmgfp']))
        custom = dict(imports=names, allow_failed_imports=False)
        resume = [Entry('resume', False)] if self.cfg.get('resume') else []
        return [Entry('custom_imports', custom), *resume]

    def merge(
        self, entries: Iterable[Entry], complete: Sequence[str] = ()
    ) -> list[Entry]:
        """Put what the command line changed into its places among the entries.

        Args:
            entries: The entries of a config.
            complete: Names of those that hold it already, beside those of lists.
        """
        entries = list(entries)
        names = {entry.name for entry in entries}
        given = [
            Entry(name, value, '' if index else 'From the command line:')
            for index, (name, value) in enumerate(
                (n, v) for n, v in self.given.items() if n not in names
            )
        ]
        result = []
        for entry in entries:
            change = self.given.get(entry.name)
            is_part = isinstance(entry.value, dict) and '_delete_' not in entry.value
            if isinstance(change, dict) and is_part and entry.name not in complete:
                entry = Entry(entry.name, merged(change, entry.value), entry.comment)
            result.append(entry)
        return result[:1] + given + result[1:]

    @property
    def backbone(self) -> dict[str, Any]:
        """Entries by which all stages train, and no other weights are loaded."""
        backbone = self.cfg.model.get('backbone') or {}
        changed: dict[str, Any] = {}
        if backbone.get('frozen_stages', -1) != -1:
            changed['frozen_stages'] = -1
        if backbone.get('init_cfg'):
            changed['init_cfg'] = None
        return dict(backbone=changed) if changed else {}


def absolute(path: str) -> str:
    """Return a local path from the root on, and an address as it is."""
    return path if '://' in path else str(Path(path).resolve())
