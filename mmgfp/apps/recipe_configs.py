"""The configs that `tools/prune.py` writes: of pruning and of fine-tuning a model.

They are plain configs on top of the one that trained the model, for their users to keep
and to edit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmgfp.apps.cli import load_config
from mmgfp.apps.config_text import Entry, changes, config_text, merged
from mmgfp.apps.training_length import length_of, shortened_schedule
from mmgfp.config import PruningConfig
from mmgfp.engine.config_search import scope_of
from mmgfp.engine.registry import PRUNING_HOOKS
from mmgfp.selection.targets import parse_targets
from mmgfp.utils.errors import ConfigError

#: Share of the iterations of fine-tuning in which the target is reached.
PRUNING_SHARE = 0.25
#: Decisions of a pruning run at least, where training is very short.
LEAST_DECISIONS = 20
#: Iterations between two decisions, by library (paper, algorithm 2).
INTERVALS = {'mmpretrain': 25, 'mmdet': 10}
#: Checkpoints that a pruning run writes on its way.
CHECKPOINTS = 20
#: Paper, section 6.
RATE = 0.1


@dataclass(frozen=True)
class Sources:
    """What the configs of pruning and fine-tuning start from.

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


class RecipeConfigs:
    """Makes the text of both configs.

    Args:
        sources: What they start from.

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
        self._given = changes(self._original.to_dict(), self.cfg.to_dict())
        self.length = length_of(copy.deepcopy(self.cfg))  # which completes it

    @property
    def iterations(self) -> int:
        """Iterations in which the target is reached."""
        share = int(self._finetuning * PRUNING_SHARE)
        interval = self.interval
        return max(share // interval, LEAST_DECISIONS) * interval

    @property
    def interval(self) -> int:
        """Iterations between two decisions."""
        return INTERVALS.get(scope_of(self.cfg) or '', 10)

    @property
    def _trained(self) -> str:
        """The file that training writes last."""
        length = self.length
        epochs = f'epoch_{length.iterations // length.epoch}'
        name = epochs if length.by_epoch else f'iter_{length.iterations}'
        return str(self.sources.work_dir / 'baseline' / f'{name}.pth')

    @property
    def _finetuning(self) -> int:
        """Iterations of fine-tuning."""
        return self.length.iterations_for(self.sources.epochs)

    @property
    def notes(self) -> list[str]:
        """What the configs leave to their user, a line for each."""
        notes = []
        if self._rate() is None:
            notes.append(
                f'{self.sources.prune}: no optim_wrapper.optimizer.lr to take a tenth '
                'of, so that the rate is that of training'
            )
        counting = [
            f'{hook.get("type")} ({key})'
            for hook in self.cfg.get('custom_hooks') or []
            for key in hook
            if 'epoch' in key and key != 'by_epoch'
        ]
        if counting and self.sources.epochs is not None:
            notes.append(
                f'{self.sources.finetune}: {", ".join(counting)} as for the whole '
                'training, as --epochs scales schedulers alone'
            )
        return notes

    def files(self, pruned: Path | None = None) -> list[tuple[Path, str, str]]:
        """Return the files to write, their texts, and the stages that use them first.

        Args:
            pruned: The file that pruning wrote last, if it is known.
        """
        sources = self.sources
        files = [
            (sources.prune, self.prune(), 'prune'),
            (sources.finetune, self.finetune(pruned), 'finetune'),
        ]
        if self._needs_flat:
            title = f'# {sources.config} in the style of the configs that inherit it.\n'
            text = title + self._original.pretty_text
            files.insert(0, (sources.flat, text, 'prune'))
        return files

    @property
    def _needs_flat(self) -> bool:
        """Whether the config imports what it names, so that no plain one inherits it."""
        config = self.sources.config
        return '::' not in config and Config._is_lazy_import(config)

    def prune(self) -> str:
        """Return the text of the config that prunes."""
        cfg, sources = self.cfg, self.sources
        targets = parse_targets(sources.pruning['target'])
        goal = ' and '.join(f'{t.cost}={t.ratio:g}' for t in targets)
        last = self.iterations + self.iterations // 10 + 10 * self.interval
        entries = [
            *self._start(),
            Entry('load_from', _absolute(sources.checkpoint or self._trained)),
            Entry(
                'model',
                self._backbone(),
                'No stage is frozen: the early ones lose channels, too (paper, section '
                '6). Weights come from load_from.',
            ),
            Entry(
                'train_cfg',
                dict(
                    _delete_=True,
                    type='IterBasedTrainLoop',
                    max_iters=last,
                    val_interval=last,
                ),
                f'The hook below stops at its target, about iteration {self.iterations}'
                f' ({PRUNING_SHARE:.0%} of fine-tuning, at least {LEAST_DECISIONS} '
                'decisions); max_iters is an upper bound.',
            ),
            *([s] if (s := self._sampler()) else []),
            *(
                Entry(name, None)
                for name in ('val_cfg', 'val_dataloader', 'val_evaluator')
                if cfg.get(name) is not None
            ),
            *([r] if (r := self._rate()) else []),
            Entry('param_scheduler', []),
            self._checkpoints(),
            Entry('log_processor', dict(by_epoch=False)),
            self._hooks(),
        ]
        title = f'Prunes the model of {sources.config} to {goal}, then stops.'
        return config_text(title, self._base(), self._merge(entries))

    def finetune(self, pruned: Path | None = None) -> str:
        """Return the text of the config that fine-tunes.

        Args:
            pruned: The file that pruning wrote last, if it is known.
        """
        sources, epochs = self.sources, self.sources.epochs
        backbone = self._backbone()
        model = dict(
            _delete_=True,
            type='PrunedModel',
            architecture='{{_base_.model}}',
            structure='{{pruned}}',
            **merged(self._given.get('model', {}), backbone),
        )
        hooks = [*(self.cfg.get('custom_hooks') or []), dict(type='ExactResumeHook')]
        entries = [
            *self._start(),
            Entry(
                'pruned',
                _absolute(str(pruned or sources.pruned)),
                'What pruning has written: weights and the number of channels.',
            ),
            Entry('model', model),
            Entry('load_from', '{{pruned}}'),
            *self._schedule(),
            *([k] if (k := self._kept_checkpoints()) else []),
            Entry(
                'custom_hooks',
                hooks,
                'A run that is interrupted is resumed exactly; SIGTERM saves first.',
            ),
        ]
        lasts = 'as long as the original was trained'
        lasts = lasts if epochs is None else f'for {epochs} epochs'
        title = f'Fine-tunes the pruned model of {sources.config} {lasts}.'
        return config_text(title, self._base(), self._merge(entries, ('model',)))

    def _base(self) -> str:
        """Return the user's config as `_base_` names it."""
        config = self.sources.config
        if '::' in config:
            return config
        if self._needs_flat:
            return f'./{self.sources.flat.name}'
        return Path(os.path.relpath(config, self.sources.work_dir)).as_posix()

    def _start(self) -> list[Entry]:
        """Return the entries that both configs begin with."""
        imports = (self.cfg.get('custom_imports') or {}).get('imports') or []
        imports = [imports] if isinstance(imports, str) else list(imports)
        names = list(dict.fromkeys([*imports, 'mmgfp']))
        custom = dict(imports=names, allow_failed_imports=False)
        resume = [Entry('resume', False)] if self.cfg.get('resume') else []
        return [Entry('custom_imports', custom), *resume]

    def _merge(
        self, entries: Sequence[Entry], complete: Sequence[str] = ()
    ) -> list[Entry]:
        """Put what the command line changed into its places among the entries.

        Args:
            entries: The entries of a config.
            complete: Names of those that hold it already, beside those of lists.
        """
        names = {entry.name for entry in entries}
        given = [
            Entry(name, value, '' if index else 'From the command line:')
            for index, (name, value) in enumerate(
                (n, v) for n, v in self._given.items() if n not in names
            )
        ]
        result = []
        for entry in entries:
            change = self._given.get(entry.name)
            is_part = isinstance(entry.value, dict) and '_delete_' not in entry.value
            if isinstance(change, dict) and is_part and entry.name not in complete:
                entry = Entry(entry.name, merged(change, entry.value), entry.comment)
            result.append(entry)
        return result[:1] + given + result[1:]

    def _backbone(self) -> dict[str, Any]:
        """Return what lets all stages train, and loads no other weights."""
        backbone = self.cfg.model.get('backbone') or {}
        changed: dict[str, Any] = {}
        if backbone.get('frozen_stages', -1) != -1:
            changed['frozen_stages'] = -1
        changed['init_cfg'] = None
        return dict(backbone=changed)

    def _sampler(self) -> Entry | None:
        """Return the sampler of an iteration-based run; others than usual stay."""
        sampler = self.cfg.train_dataloader.get('sampler') or {}
        if _name_of(sampler.get('type', 'DefaultSampler')) != 'DefaultSampler':
            return None
        others = sampler.keys() - {'type', 'shuffle', '_scope_'}
        new = dict({'_delete_': True} if others else {}, type='InfiniteSampler')
        new['shuffle'] = sampler.get('shuffle', True)
        return Entry('train_dataloader', dict(sampler=new))

    def _rate(self) -> Entry | None:
        """Return a tenth of the learning rate, None if the config has no single one."""
        wrapper = self.cfg.optim_wrapper
        rate = (wrapper.get('optimizer') or {}).get('lr')
        if not isinstance(rate, int | float):
            return None
        value = dict(optimizer=dict(lr=float(f'{rate * RATE:.6g}')))
        return Entry('optim_wrapper', value, "A tenth of the training's rate.")

    def _checkpoints(self) -> Entry:
        interval = max(self.iterations // CHECKPOINTS // self.interval, 1)
        hook: dict[str, Any] = dict(
            type='CheckpointHook',
            by_epoch=False,
            interval=interval * self.interval,
            max_keep_ckpts=1,
        )
        if _checkpoint_hook(self.cfg).get('save_best'):
            hook['save_best'] = None  # nothing is validated
        return Entry('default_hooks', dict(checkpoint=hook))

    def _kept_checkpoints(self) -> Entry | None:
        """Return a checkpoint each epoch, where the config writes them less often."""
        hook = _checkpoint_hook(self.cfg)
        by_epoch = hook.get('by_epoch', True)
        if not (self.length.by_epoch and by_epoch and hook.get('interval', 1) > 1):
            return None
        value = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
        return Entry('default_hooks', value, 'To go on from after an interruption.')

    def _hooks(self) -> Entry:
        options = {
            'interval': self.interval,
            'iterations': self.iterations,
            'normalize': 'memory',
            **self.sources.pruning,
        }
        fisher = options.get('criterion', 'fisher') == 'fisher'
        kind = 'FisherPruningHook' if fisher else 'ChannelPruningHook'
        hooks = [*(self.cfg.get('custom_hooks') or []), dict(type=kind, **options)]
        return Entry(
            'custom_hooks',
            hooks,
            'Every option of the hook: mmgfp/config.py. iterations sets the pace.',
        )

    def _schedule(self) -> list[Entry]:
        """Return how long fine-tuning lasts, if other than training did."""
        if self.sources.epochs is None:
            return []
        return shortened_schedule(self.cfg, self.length, self.sources.epochs)


def check_unpruned(cfg: Config, name: str) -> None:
    """Refuse a config that prunes, or is of a pruned model.

    Raises:
        ConfigError: If it is one.
    """
    names = [_name_of(hook.get('type')) for hook in cfg.get('custom_hooks') or []]
    hooks = [name for name in names if name in PRUNING_HOOKS]
    if _name_of((cfg.get('model') or {}).get('type')) == 'PrunedModel':
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


def _checkpoint_hook(cfg: Config) -> Mapping[str, Any]:
    return (cfg.get('default_hooks') or {}).get('checkpoint') or {}


def _name_of(kind: Any) -> str:
    """Return the last part of the name of a ``type``, a text or a class."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _absolute(path: str) -> str:
    return path if '://' in path else str(Path(path).resolve())
