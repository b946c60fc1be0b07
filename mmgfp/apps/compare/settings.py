"""What a comparison runs: variants, targets and seeds, and the configs of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from mmengine.config import Config

from mmgfp.apps.cli import check_checkpoint, load_config, override
from mmgfp.apps.compare.variants import (
    PLACEHOLDERS,
    Options,
    Run,
    Variant,
    filled,
    is_by_names,
    slug,
)
from mmgfp.apps.stages import find_hook, finetuning_start, parse_options
from mmgfp.config import PruningConfig
from mmgfp.engine.pruned_model import INITS
from mmgfp.engine.registry import is_named
from mmgfp.selection.targets import Target, parse_targets
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import check_known
from mmgfp.utils.validation import check, check_count


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
    seeds: Sequence[int] | None = None
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
        for name in ('targets', 'seeds', 'batches'):
            value = getattr(self, name)
            is_list = isinstance(value, list | tuple) and bool(value)
            is_none = value is None and name != 'batches'
            check(name, is_list or is_none, 'a list of at least one', value)
        for seed in self.seeds or ():
            check_count('seeds', seed, 'whole numbers from 0 on', 0)
        for batch in self.batches:
            check_count('batches', batch)
        check_count('latency_rounds', self.latency_rounds, 'a count, or 0', 0)
        is_path = self.checkpoint is None or isinstance(self.checkpoint, str)
        check('checkpoint', is_path, 'the path of a file', self.checkpoint)
        if self.seeds and 'randomness.seed' in self.options:
            raise ConfigError('options', 'no seed beside seeds', 'one', 'use seeds')
        for name in ('also', 'options'):
            value = getattr(self, name)
            check(name, is_by_names(value), 'a dict by names', value)
        for name, test in self.also.items():
            is_list = isinstance(test, list | tuple)
            are_entries = is_list and all('=' in str(entry) for entry in test)
            check(f'also: {name}', are_entries, 'a list of texts key=value', test)
        # Rows of the table go by names, results by folders.
        for names in ([r.name for r in self.runs], [str(r.folder) for r in self.runs]):
            twice = [name for name in names if names.count(name) > 1]
            expected = 'different ones for each run'
            check('variants, targets and seeds', not twice, expected, twice[:1])

    @cached_property
    def runs(self) -> list[Run]:
        """All runs; all variants come before the second seed."""
        seeds: Sequence[int | None] = self.seeds or [None]
        return [
            Run(variant, targets, seed)
            for seed in seeds
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
            ConfigError: If a config cannot be read, settings of the hook are wrong, or
                there is no such checkpoint.
        """
        if self.checkpoint is not None:
            check_checkpoint('checkpoint', self.checkpoint)
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
                    init = self.finetune_config(run, files).model.get('init', INITS[0])
                    check(
                        'finetune: model.init', init in INITS, f'one of {INITS}', init
                    )
                else:
                    self.train_config(run, files)
            except ConfigError as error:
                raise ConfigError(f'variant {run.variant.name!r}: {error}') from None

    def baseline_config(self) -> Config:
        """Return the config that trains the original model."""
        return _resumable(load_config(self.baseline, dict(self.options)))

    def prune_config(self, run: Run, files: Mapping[str, str]) -> Config:
        """Return the config that prunes the original model."""
        cfg = load_config(self.prune, dict(self.options))
        override(cfg, {'load_from': files['baseline_checkpoint']})
        asked = find_hook(cfg)[1].get('target')
        _enter(cfg, run.variant.prune, run, files)
        index, hook = find_hook(cfg)
        settings = filled(run.variant.pruning, run, files)
        named = {name.partition('.')[0] for name in settings}
        if 'target' in named or hook.get('target') not in (None, asked):
            remedy = "name it in the comparison's or the variant's targets"
            raise ConfigError('pruning', 'settings beside the target', 'one', remedy)
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
        return cfg

    def finetune_config(self, run: Run, files: Mapping[str, str]) -> Config:
        """Return the config that fine-tunes what was pruned.

        Args:
            run: The run.
            files: The files of the run by their names in `PLACEHOLDERS`.
        """
        cfg = load_config(self.finetune, dict(self.options))
        check(f'{self.finetune}: model', 'model' in cfg, 'the pruned model', None)
        entries = _enter(cfg, run.variant.finetune, run, files)
        checkpoints = files['pruned_checkpoint'], files['baseline_checkpoint']
        start = parse_options(finetuning_start(cfg, *checkpoints))
        override(cfg, {k: v for k, v in start.items() if k not in entries})
        return _resumable(cfg)

    def train_config(self, run: Run, files: Mapping[str, str]) -> Config:
        """Return the config that trains an unpruned variant from scratch."""
        cfg = load_config(run.variant.config or self.baseline, dict(self.options))
        override(cfg, {'load_from': None})
        _enter(cfg, run.variant.train or {}, run, files)
        return _resumable(cfg)


def _enter(
    cfg: Config, entries: Options, run: Run, files: Mapping[str, str]
) -> Mapping[str, Any]:
    """Override entries of a config by those of a run, and its seed; return them.

    Raises:
        ConfigError: If the entries name another seed.
    """
    before = dict(cfg.get('randomness') or {})
    given = filled(entries, run, files)
    override(cfg, given)
    if run.seed is None:
        return given
    after = cfg.get('randomness', {})
    check('randomness', isinstance(after, Mapping), 'a dict', after)
    if after.get('seed') != before.get('seed'):
        raise ConfigError('randomness.seed', 'none in a variant', 'one', 'use seeds')
    override(cfg, {'randomness.seed': run.seed})
    return given


def _resumable(cfg: Config) -> Config:
    """Let a training that is interrupted end as if it had not been."""
    hooks = cfg.get('custom_hooks') or []
    are_dicts = all(isinstance(hook, Mapping) for hook in hooks)
    check('custom_hooks', are_dicts, 'a list of dicts', hooks)
    kinds = [hook.get('type') for hook in hooks]
    names = [kind if isinstance(kind, str) else kind.__name__ for kind in kinds if kind]
    if not any(is_named(name, 'ExactResumeHook') for name in names):
        cfg.custom_hooks = [*hooks, dict(type='ExactResumeHook')]
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
    is_list = isinstance(entries['variants'], list | tuple)
    check('variants', is_list, 'a list of dicts', entries['variants'])
    is_dict = isinstance(entries.get('options', {}), Mapping)
    check('options', is_dict, 'a dict by names', entries.get('options'))
    for number, variant in enumerate(entries['variants']):
        has_name = isinstance(variant, Mapping) and 'name' in variant
        check(f'variants[{number}]', has_name, 'a dict with a name', variant)
        check_known(f'variant {variant["name"]!r}', variant, known)
    entries['variants'] = tuple(Variant(**v) for v in entries['variants'])
    entries['options'] = {**entries.get('options', {}), **parse_options(options)}
    return Comparison(**entries)
