"""Variants of a comparison, and the runs that they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmgfp.selection.targets import Target
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check

Options = Mapping[str, Any]

#: Files of a run that texts of a variant may name in braces; ``{seed}`` is its seed,
#: or 0 where the comparison names none.
PLACEHOLDERS = ('baseline_config', 'baseline_checkpoint', 'pruned_checkpoint')


def filled(node: Any, run: Run, files: Mapping[str, str]) -> Any:
    """Return nested options with what `PLACEHOLDERS` and ``{seed}`` stand for.

    Examples:
        >>> run = Run(Variant('random'), (), 2)
        >>> filled(dict(seed='{seed}', hooks=['{pruned_checkpoint}', 'r{seed}']), run,
        ...        dict(pruned_checkpoint='a.pth'))
        {'seed': 2, 'hooks': ['a.pth', 'r2']}
    """
    if isinstance(node, Mapping):
        return {key: filled(value, run, files) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(filled(value, run, files) for value in node)
    if node == '{seed}':
        return run.seed or 0
    if isinstance(node, str):
        for name, text in {**files, 'seed': str(run.seed or 0)}.items():
            node = node.replace(f'{{{name}}}', text)
    return node


def is_by_names(value: object) -> bool:
    """Return whether a value is a dict of which all keys are texts."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


@dataclass(frozen=True)
class Variant:
    """One way to get a small model.

    Attributes:
        name: Its name in the table.
        pruning: Settings of the pruning hook that replace those of the config; None
            drops one.
        prune: Entries of the pruning config to override, before those of the hook.
        finetune: Entries of the fine-tuning config to override.
        train: Entries of the baseline's config to override: the variant is not pruned
            but trained from scratch, once for each seed.
        config: The config to train it by; the baseline's by default.
        targets: Targets of this variant; those of the comparison by default.

    Texts in the dicts may name `PLACEHOLDERS` in braces.
    """

    name: str
    pruning: Options = field(default_factory=dict)
    prune: Options = field(default_factory=dict)
    finetune: Options = field(default_factory=dict)
    train: Options | None = None
    config: str | None = None
    targets: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        # Names stand in a table, where the baseline has a row of its own.
        is_name = isinstance(self.name, str) and bool(self.name.strip())
        is_name = is_name and not set('|\n') & set(self.name)
        expected = "a text in one line without |, and not 'baseline'"
        check(
            'variants: name', is_name and self.name != 'baseline', expected, self.name
        )
        owner = f'variant {self.name!r}'
        for option in ('pruning', 'prune', 'finetune', 'train'):
            value = getattr(self, option)
            is_valid = is_by_names(value) or (option == 'train' and value is None)
            check(f'{owner}: {option}', is_valid, 'a dict by names', value)
        is_path = self.config is None or isinstance(self.config, str)
        check(f'{owner}: config', is_path, 'the path of a config', self.config)
        if not self.is_pruned and (self.pruning or self.prune or self.finetune):
            raise ConfigError(
                owner,
                'either pruned (pruning, prune, finetune) or trained (train, config)',
                'both',
                'make two variants of it',
            )
        if self.targets is not None:
            expected = 'a list of at least one for what is pruned, else None'
            is_list = isinstance(self.targets, list | tuple) and bool(self.targets)
            is_valid = is_list and self.is_pruned
            check(f'{owner}: targets', is_valid, expected, self.targets)

    @property
    def is_pruned(self) -> bool:
        """Whether the variant is pruned, and not trained from scratch."""
        return self.train is None and self.config is None


@dataclass(frozen=True)
class Run:
    """One variant at one target under one seed.

    Attributes:
        variant: The variant.
        targets: Targets of the hook, of which the last one counts; none without
            pruning.
        seed: Of the random numbers; None for that of the configs.
    """

    variant: Variant
    targets: tuple[Target, ...]
    seed: int | None

    @property
    def target_text(self) -> str:
        """The targets in words, such as ``flops=0.5``; empty without pruning."""
        return ', then '.join(f'{t.cost}={t.ratio:g}' for t in self.targets)

    @property
    def name(self) -> str:
        """The run in words."""
        seed = '' if self.seed is None else f'seed {self.seed}'
        return ', '.join(filter(None, (self.variant.name, self.target_text, seed)))

    @property
    def folder(self) -> Path:
        """The run's folder, below one for all runs."""
        target = '_'.join(t.label for t in self.targets) or 'unpruned'
        seed = 'seed' if self.seed is None else f'seed{self.seed}'
        return Path(slug(self.variant.name), target, seed)


def slug(name: str) -> str:
    """Return a name of a folder.

    Examples:
        >>> slug('fisher -M, 3 epochs')
        'fisher_-M_3_epochs'
    """
    return re.sub(r'[^\w.-]+', '_', name).strip('._') or '_'
