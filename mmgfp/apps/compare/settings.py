"""What a comparison runs: variants, targets and seeds, and the configs of each run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.apps.cli import load_config, override
from mmgfp.apps.stages import find_hook, finetuning_start, parse_options
from mmgfp.config import PruningConfig
from mmgfp.engine.registry import is_named
from mmgfp.selection.targets import Target, parse_targets
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import check_known
from mmgfp.utils.validation import check

Options = Mapping[str, Any]


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

    The texts of all these entries may name `PLACEHOLDERS` in braces.
    """

    name: str
    pruning: Options = field(default_factory=dict)
    prune: Options = field(default_factory=dict)
    finetune: Options = field(default_factory=dict)
    train: Options | None = None
    config: str | None = None
    targets: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        is_name = isinstance(self.name, str) and bool(self.name.strip())
        check('variants: name', is_name, 'a text', self.name)
        owner = f'variant {self.name!r}'
        for option in ('pruning', 'prune', 'finetune'):
            value = getattr(self, option)
            check(f'{owner}: {option}', isinstance(value, Mapping), 'a dict', value)
        if not self.is_pruned and (self.pruning or self.prune or self.finetune):
            raise ConfigError(
                owner,
                'either pruned (pruning, prune, finetune) or trained (train, config)',
                'both',
                'make two variants of it',
            )
        if self.targets is not None:
            check(f'{owner}: targets', self.is_pruned, 'None without pruning', '')

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
        """The target in words, such as ``flops=0.5``; empty without pruning."""
        return ''.join(f'{t.cost}={t.ratio:g}' for t in self.targets[-1:])

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


@dataclass(frozen=True)
class Comparison:
    """A list of variants on one data set under one budget.

    Attributes:
        baseline: Config that trains the original model.
        prune: Config that prunes it.
        finetune: Config that fine-tunes what is left.
        variants: What is compared.
        targets: Targets of the pruning hook, a run for each; its own by default.
        seeds: Seeds of pruning and fine-tuning, a run for each; the configs' by
            default.
        checkpoint: Weights of the original model, which is trained first without.
        metric: The metric that is compared, larger being better; by default COCO's mAP
            or the top-1 accuracy.
        also: Further tests of each model: config entries as ``key=value``, by name.
        options: Entries to override in the configs of all stages.
        batches: Batch sizes that are timed.
        latency_rounds: How often each model is timed; 0 times nothing.
    """

    baseline: str
    prune: str
    finetune: str
    variants: tuple[Variant, ...]
    targets: Sequence[Any] | None = None
    seeds: Sequence[int | None] | None = None
    checkpoint: str | None = None
    metric: str | None = None
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    batches: Sequence[int] = (1,)
    latency_rounds: int = 50

    def __post_init__(self) -> None:
        check('variants', bool(self.variants), 'at least one', [])
        folders = [slug(variant.name) for variant in self.variants]
        twice = [v.name for v in self.variants if folders.count(slug(v.name)) > 1]
        check('variants', not twice, 'of names (and folders) of their own', twice)
        for name in ('targets', 'seeds'):
            value = getattr(self, name)
            is_list = value is None or (isinstance(value, list | tuple) and value)
            check(name, bool(is_list), 'a list of at least one, or None', value)
        runs = [run.folder for run in self.runs]
        twice = [str(folder) for folder in runs if runs.count(folder) > 1]
        check('targets and seeds', not twice, 'a list of different ones', twice[:1])

    @cached_property
    def runs(self) -> list[Run]:
        """All runs; all variants come before the second seed."""
        return [
            Run(variant, targets, seed)
            for seed in self.seeds or [None]
            for variant in self.variants
            for targets in self._targets_of(variant)
        ]

    def _targets_of(self, variant: Variant) -> list[tuple[Target, ...]]:
        if not variant.is_pruned:
            return [()]
        targets = variant.targets or self.targets
        if targets is None:
            _, hook = find_hook(load_config(self.prune, dict(self.options)))
            targets = [hook.get('target', PruningConfig().target)]
        return [parse_targets(target) for target in targets]

    def check_configs(self) -> None:
        """Make the config of every run, so that what is wrong is said at once.

        Raises:
            ConfigError: If a config cannot be read, or settings of the hook are wrong.
        """
        files = {name: f'{name}.pth' for name in PLACEHOLDERS}
        load_config(self.baseline, dict(self.options))
        for run in self.runs:
            if run.seed != self.runs[0].seed:
                continue  # the same configs but for the seed
            try:
                if run.variant.is_pruned:
                    cfg = self.prune_config(run, files)
                    _, hook = find_hook(cfg)
                    left_out = ('type', 'priority')
                    settings = {k: v for k, v in hook.items() if k not in left_out}
                    PruningConfig.for_runner(**settings)
                    self.finetune_config(run, files)
                else:
                    self.train_config(run, files)
            except ConfigError as error:
                raise ConfigError(f'variant {run.variant.name!r}: {error}') from None

    def baseline_config(self) -> Config:
        """Return the config that trains the original model."""
        return load_config(self.baseline, dict(self.options))

    def prune_config(self, run: Run, files: Mapping[str, str]) -> Config:
        """Return the config that prunes the original model."""
        cfg = load_config(self.prune, dict(self.options))
        override(cfg, {'load_from': files['baseline_checkpoint']})
        override(cfg, filled(run.variant.prune, run, files))
        index, hook = find_hook(cfg)
        settings = filled(run.variant.pruning, run, files)
        if 'criterion' in settings and is_named(hook['type'], 'FisherPruningHook'):
            settings.setdefault('type', 'ChannelPruningHook')  # takes any criterion
        targets = [{target.cost: target.ratio} for target in run.targets]
        settings['target'] = targets if len(targets) > 1 else targets[0]
        for name, value in settings.items():
            if '.' in name:
                override(cfg, {f'custom_hooks.{index}.{name}': value})
            elif value is None:
                cfg.custom_hooks[index].pop(name, None)
            else:
                cfg.custom_hooks[index][name] = value
        return _seeded(cfg, run.seed)

    def finetune_config(self, run: Run, files: Mapping[str, str]) -> Config:
        """Return the config that fine-tunes what was pruned.

        Args:
            run: The run.
            files: The files of the run by their names in `PLACEHOLDERS`.
        """
        cfg = load_config(self.finetune, dict(self.options))
        entries = filled(run.variant.finetune, run, files)
        override(cfg, entries)
        checkpoints = files['pruned_checkpoint'], files['baseline_checkpoint']
        start = parse_options(finetuning_start(cfg, *checkpoints))
        override(cfg, {k: v for k, v in start.items() if k not in entries})
        return _seeded(cfg, run.seed)

    def train_config(self, run: Run, files: Mapping[str, str]) -> Config:
        """Return the config that trains an unpruned variant from scratch."""
        cfg = load_config(run.variant.config or self.baseline, dict(self.options))
        override(cfg, {'load_from': None})
        override(cfg, filled(run.variant.train or {}, run, files))
        return _seeded(cfg, run.seed)


#: Files of a run that texts of a variant may name in braces; ``{seed}`` is its seed.
PLACEHOLDERS = ('baseline_config', 'baseline_checkpoint', 'pruned_checkpoint')


def filled(node: Any, run: Run, files: Mapping[str, str]) -> Any:
    """Return nested options with what `PLACEHOLDERS` and ``{seed}`` stand for.

    Examples:
        >>> run = Run(Variant('random'), (), 2)
        >>> filled(dict(seed='{seed}', hooks=['{pruned_checkpoint}', 3]), run,
        ...        dict(pruned_checkpoint='a.pth'))
        {'seed': 2, 'hooks': ['a.pth', 3]}
    """
    if isinstance(node, Mapping):
        return {key: filled(value, run, files) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(filled(value, run, files) for value in node)
    if node == '{seed}':
        return run.seed or 0
    if isinstance(node, str):
        for name, path in files.items():
            node = node.replace(f'{{{name}}}', path)
    return node


def _seeded(cfg: Config, seed: int | None) -> Config:
    if seed is not None:
        override(cfg, {'randomness.seed': seed})
    return cfg


def read_comparison(path: str, options: Sequence[str] = (), **given: Any) -> Comparison:
    """Read a comparison from its file.

    Args:
        path: The file, a config of MMEngine with the fields of `Comparison`; variables
            that begin with an underscore are its own.
        options: Entries to override in the configs of all stages, as ``key=value``;
            they come on top of those of the file.
        **given: Fields that replace those of the file.

    Raises:
        ConfigError: If a field is unknown, missing or not valid.
    """
    entries = load_config(path).to_dict()
    entries = {k: v for k, v in entries.items() if not k.startswith('_')}
    names = [f.name for f in fields(Comparison)]
    check_known(path, entries, names)
    entries |= given
    required = ('baseline', 'prune', 'finetune', 'variants')
    missing = [name for name in required if not entries.get(name)]
    if missing:
        got, remedy = f'none for {", ".join(missing)}', 'see docs/compare.md'
        raise ConfigError(path, f'with {", ".join(required)}', got, remedy)
    known = [f.name for f in fields(Variant)]
    for number, variant in enumerate(entries['variants']):
        check(f'variants[{number}]', 'name' in variant, 'a dict with a name', variant)
        check_known(f'variant {variant["name"]!r}', variant, known)
    entries['variants'] = tuple(Variant(**v) for v in entries['variants'])
    entries['options'] = {**entries.get('options', {}), **parse_options(options)}
    return Comparison(**entries)
