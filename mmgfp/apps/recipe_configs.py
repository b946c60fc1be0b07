"""The configs that `tools/prune.py` writes: of pruning and of fine-tuning a model.

They are plain configs on top of the one that trained the model, for their users to keep
and to edit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmgfp.apps.config_text import Entry, config_text, merged
from mmgfp.apps.recipe_basis import RecipeBasis, absolute
from mmgfp.apps.recipe_sources import Sources, name_of
from mmgfp.apps.training_length import shortened_schedule
from mmgfp.engine.config_search import scope_of
from mmgfp.selection.targets import parse_targets
from mmgfp.utils.words import counted

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


class PruneRecipe:
    """Makes the config that prunes.

    Args:
        basis: What it inherits from.
    """

    def __init__(self, basis: RecipeBasis) -> None:
        self.basis = basis
        self.cfg = basis.cfg

    @property
    def iterations(self) -> int:
        """Iterations in which the target is reached."""
        return max(self._by_share, LEAST_DECISIONS) * self.interval

    @property
    def _by_share(self) -> int:
        """Decisions in a share of the iterations of fine-tuning."""
        return int(self.basis.finetuning * PRUNING_SHARE) // self.interval

    @property
    def _pace(self) -> str:
        """The reason for the number of iterations, for people."""
        if self._by_share >= LEAST_DECISIONS:
            return f'{PRUNING_SHARE:.0%} of fine-tuning'
        return f'{LEAST_DECISIONS} decisions, as fine-tuning is short'

    @property
    def interval(self) -> int:
        """Iterations between two decisions."""
        return INTERVALS.get(scope_of(self.cfg) or '', 10)

    def text(self) -> str:
        """Return the text of the config."""
        basis, sources = self.basis, self.basis.sources
        targets = parse_targets(sources.pruning['target'])
        goal = ' and '.join(f'{t.cost}={t.ratio:g}' for t in targets)
        last = self.iterations + self.iterations // 10 + 10 * self.interval
        entries = [
            *basis.start(),
            Entry('load_from', absolute(sources.checkpoint or basis.trained)),
            self._model(),
            Entry(
                'train_cfg',
                dict(
                    _delete_=True,
                    type='IterBasedTrainLoop',
                    max_iters=last,
                    val_interval=last,
                ),
                f'The hook below stops at its target, about iteration {self.iterations}'
                f' ({self._pace}); max_iters is an upper bound.',
            ),
            self._sampler(),
            *(
                Entry(name, None)
                for name in ('val_cfg', 'val_dataloader', 'val_evaluator')
                if self.cfg.get(name) is not None
            ),
            self.rate(),
            Entry('param_scheduler', []),
            self._checkpoints(),
            Entry('log_processor', dict(by_epoch=False)),
            self._hooks(),
        ]
        title = f'Prunes the model of {sources.config} to {goal}, then stops.'
        return config_text(title, basis.base(), basis.merge(filter(None, entries)))

    def _model(self) -> Entry | None:
        if not self.basis.backbone:
            return None
        why = (
            'All stages train, as the early ones lose channels, too (paper, section 6)'
        )
        weights = '; weights come from load_from.'
        return Entry('model', self.basis.backbone, why + weights)

    def _sampler(self) -> Entry | None:
        """Return the sampler of an iteration-based run; others than usual stay."""
        sampler = self.cfg.train_dataloader.get('sampler') or {}
        if name_of(sampler.get('type', 'DefaultSampler')) != 'DefaultSampler':
            return None
        others = sampler.keys() - {'type', 'shuffle', '_scope_'}
        new = dict({'_delete_': True} if others else {}, type='InfiniteSampler')
        new['shuffle'] = sampler.get('shuffle', True)
        return Entry('train_dataloader', dict(sampler=new))

    def rate(self) -> Entry | None:
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
        if self.basis.checkpoint_hook.get('save_best'):
            hook['save_best'] = None  # nothing is validated
        return Entry('default_hooks', dict(checkpoint=hook))

    def _hooks(self) -> Entry:
        options = {
            'interval': self.interval,
            'iterations': self.iterations,
            'normalize': 'memory',
            **self.basis.sources.pruning,
        }
        fisher = options.get('criterion', 'fisher') == 'fisher'
        kind = 'FisherPruningHook' if fisher else 'ChannelPruningHook'
        hooks = [*self.basis.hooks, dict(type=kind, **options)]
        return Entry(
            'custom_hooks',
            hooks,
            'Every option of the hook: mmgfp/config.py. iterations sets the pace.',
        )


def finetune_text(basis: RecipeBasis, pruned: Path | None = None) -> str:
    """Return the text of the config that fine-tunes.

    Args:
        basis: What it inherits from.
        pruned: The file that pruning wrote last, if it is known.
    """
    sources, epochs = basis.sources, basis.sources.epochs
    backbone = (
        dict(backbone=dict(init_cfg=None)) if 'backbone' in basis.cfg.model else {}
    )
    model = dict(
        _delete_=True,
        type='PrunedModel',
        architecture='{{_base_.model}}',
        structure='{{pruned}}',
        **merged(merged(basis.given.get('model', {}), backbone), basis.backbone),
    )
    hooks = [*basis.hooks, dict(type='ExactResumeHook')]
    cfg, length = basis.cfg, basis.length
    schedule = shortened_schedule(cfg, length, epochs) if epochs is not None else []
    entries = [
        *basis.start(),
        Entry(
            'pruned',
            absolute(str(pruned or sources.pruned)),
            'What pruning has written: weights and the number of channels.',
        ),
        Entry('model', model),
        Entry('load_from', '{{pruned}}'),
        *schedule,
        _kept_checkpoints(basis),
        Entry(
            'custom_hooks',
            hooks,
            'A run that is interrupted is resumed exactly; SIGTERM saves first.',
        ),
    ]
    lasts = 'as long as the original was trained'
    if epochs is not None:
        lasts = f'for {counted(epochs, "epoch")}'
    title = f'Fine-tunes the pruned model of {sources.config} {lasts}.'
    return config_text(
        title, basis.base(), basis.merge(filter(None, entries), ('model',))
    )


def _kept_checkpoints(basis: RecipeBasis) -> Entry | None:
    """Return a checkpoint each epoch, where the config writes them less often."""
    hook = basis.checkpoint_hook
    by_epoch = basis.length.by_epoch and hook.get('by_epoch', True)
    # A hook that names no interval saves at the end alone; runners add one of 1.
    if not (hook and by_epoch) or hook.get('interval', -1) == 1:
        return None
    value = dict(checkpoint=dict(interval=1, max_keep_ckpts=1))
    return Entry('default_hooks', value, 'To go on from after an interruption.')


class RecipeConfigs:
    """Both configs, and what else is needed beside them.

    Args:
        sources: What they start from.

    Raises:
        ConfigError: If the config is of pruning already, or cannot train.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.basis = RecipeBasis(sources)

    @property
    def notes(self) -> list[str]:
        """Lines on what the configs leave to their user."""
        notes = []
        if PruneRecipe(self.basis).rate() is None:
            notes.append(
                f'{self.sources.prune}: no optim_wrapper.optimizer.lr to take a tenth '
                'of, so that the rate is that of training'
            )
        counting = [
            f'{hook.get("type")} ({key})'
            for hook in self.basis.hooks
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
            (sources.prune, PruneRecipe(self.basis).text(), 'prune'),
            (sources.finetune, finetune_text(self.basis, pruned), 'finetune'),
        ]
        if self.basis.needs_flat:
            files.insert(0, (sources.flat, self.basis.flat_text, 'prune'))
        return files
