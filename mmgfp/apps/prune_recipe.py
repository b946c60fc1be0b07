"""How a model is pruned without training: the arguments of `tools/prune.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mmengine.config import Config

from mmgfp.apps.rounds_file import digest_of, digest_of_file
from mmgfp.apps.run_config import pruning_config
from mmgfp.compensation.in_training import NONE
from mmgfp.compensation.options import FEW_ROWS, METHODS, CompensationConfig
from mmgfp.config import PruningConfig
from mmgfp.rounds import stations
from mmgfp.selection.targets import parse_targets
from mmgfp.utils.errors import ConfigError

#: Choices of ``--compensate``.
COMPENSATIONS = (*METHODS, NONE)


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned without training.

    Attributes:
        options: What may go, and to which target.
        compensate: How layers are refitted, one of `COMPENSATIONS`.
        shares: Shares of the cost at which cuts end, falling to the target.
        images: Training images to use.
        batch_size: Images of a batch; that of the config if None.
        label_free: Whether the distance to the model's own outputs stands for the
            loss, so that images need no annotations.
    """

    options: PruningConfig
    compensate: str
    shares: Sequence[float]
    images: int
    batch_size: int | None = None
    label_free: bool = False

    @property
    def compensation(self) -> CompensationConfig | None:
        """How layers are refitted; None leaves the model as cut."""
        if self.compensate == NONE:
            return None
        return CompensationConfig(method=self.compensate, rows=FEW_ROWS)

    def settings(self, cfg: Config, checkpoint: str) -> dict[str, Any]:
        """Return all that the result depends on, by names that users know.

        Args:
            cfg: The config of the model.
            checkpoint: Its weights.
        """
        options = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        del given['options'], given['shares']
        return {
            **options,
            **{name.replace('_', '-'): value for name, value in given.items()},
            'rounds': list(self.shares),
            'CONFIG': digest_of(cfg.pretty_text.encode()),
            'CHECKPOINT': digest_of_file(checkpoint),
        }


def pruning_options(cfg: Config, **given: Any) -> PruningConfig:
    """Return the options of pruning: those given, else of the config's hook, if any.

    Raises:
        ConfigError: If an option is not valid, or there are several targets.
    """
    given = {name: value for name, value in given.items() if value is not None}
    targets = parse_targets(given['target'])
    if len(targets) != 1:
        names = ', '.join(t.cost for t in targets)
        raise ConfigError('--target', 'one cost', names, 'keep one of them')
    return PruningConfig.of(pruning_config(cfg), **given)


def shares_of(options: PruningConfig, words: Sequence[str] | None) -> list[float]:
    """Return the shares of the target's cost at which cuts end.

    Args:
        options: The options of pruning.
        words: What ``--rounds`` was given: a number of cuts, or all shares.

    Raises:
        ConfigError: If it is neither, or the last share is not the target.

    Examples:
        >>> options = PruningConfig(target=dict(flops=0.5))
        >>> shares_of(options, ['2'])
        [0.7071067811865476, 0.5]
        >>> shares_of(options, ['0.8', '0.6', '0.5'])
        [0.8, 0.6, 0.5]
    """
    (target,) = options.targets
    if not words:
        return stations(target.ratio)
    got = ' '.join(words)
    if len(words) == 1 and words[0].isdecimal() and int(words[0]) > 0:
        return stations(target.ratio, int(words[0]))
    expected = 'a number of cuts, or shares of the cost such as 0.8 0.6 0.5'
    try:
        shares = [float(word) for word in words]
    except ValueError:
        raise ConfigError('--rounds', expected, got, 'give one of these') from None
    if shares[-1] != target.ratio:
        expected = f'shares of which the last one is the target, {target.ratio:g}'
        remedy = 'end with it; a whole number is a number of cuts'
        raise ConfigError('--rounds', expected, got, remedy)
    try:
        return stations(target.ratio, shares[:-1])
    except ConfigError:
        expected = f'shares below 1 that fall to the target, {target.ratio:g}'
        raise ConfigError('--rounds', expected, got, 'order them') from None
