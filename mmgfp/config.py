"""The options of a pruning run, each written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mmgfp.compensation.in_training import InTraining, read_compensation
from mmgfp.criteria.base import CRITERIA, Criterion, check_scores_blocks
from mmgfp.selection.costs import COSTS, Cost
from mmgfp.selection.greedy import NO_NORMALIZATION
from mmgfp.selection.latency import Latency
from mmgfp.selection.latency_profile import LatencyProfile, read_profile
from mmgfp.selection.recovery import check_recovery
from mmgfp.selection.schedules import Schedule, build_schedule
from mmgfp.selection.scope import read_ratios
from mmgfp.selection.targets import Target, parse_targets
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import check_known
from mmgfp.utils.validation import check, check_count

Spec = str | Mapping[str, Any]

#: Kernels of CPUs and GPUs are made for blocks of so many channels; other widths may
#: take longer than the next block (docs/performance.md). Networks of plain PyTorch may
#: be too narrow for it, so that only runs of MMEngine's runner begin with it.
RUNNER_DIVISOR = 8


@dataclass(frozen=True)
class PruningConfig:
    """Options of a pruning run, checked when they are given.

    The pruner and the hook take them by name or as one object. ``input_shape``,
    ``compact_interval`` and ``compensate`` concern runs of MMEngine's runner alone.

    Attributes:
        target: When to stop, such as ``dict(flops=0.5)``, a share of the unpruned
            model's multiply-accumulates; a list gives several stations on the way, each
            with a checkpoint of its own.
        interval: Iterations between two decisions (paper: 10 for detection, 25 for
            classification).
        criterion: How importance is measured: a name in `CRITERIA`, or
            ``dict(type=name, ...)`` with arguments (docs/criteria.md).
        normalize: Cost that importance is divided by: ``'memory'`` (the paper's -M),
            ``'flops'`` (-F), another name in `COSTS`, or ``'none'`` (-U).
        scope: ``'global'`` if the units of all groups compete, ``'local'`` if groups
            lose units in proportion: of equal shares, or of ``ratios``. What importance
            is divided by has no effect then.
        ratios: For local scope, the share of units that goes from each group at the
            end at most: a dict by names or glob patterns of groups, or a JSON file that
            has one under ``"ratios"``. Groups that it does not name stay whole.
        units_per_step: Units that go at each decision; ``'auto'`` takes as many as
            together have, at worst, little of all importance.
        iterations: Iterations in which the last target is reached, at an even pace of
            its cost; instead of ``units_per_step``.
        schedule: Another pace, instead of both: a name in `SCHEDULES`, or
            ``dict(type='cubic', iterations=5000)``.
        divisor: Channels of a group come to rest at multiples of this number, if at all
            they get fewer. Runs of MMEngine's runner begin with 8, which the kernels of
            most devices are made for; the paper's exact method is 1; ``'auto'`` takes
            the smallest one that is not slower than larger ones by the latency profile.
        min_channels: Output channels that always stay in each group.
        max_ratio: Largest share of a group that may go.
        keep: Names or glob patterns of layers that are never pruned.
        recover: Whether pruned units are still scored and come back, with the weights
            that they had, where others are worth less (docs/decisions/recover.md); the
            paper's masks are for good.
        coupled: Whether channels that several layers share may go; False leaves those
            that one layer makes and one other reads (the paper's ablation -I).
        blocks: Whether whole residual blocks may go, too, where their importance per
            cost is the lowest: they become `nn.Identity` (docs/decisions/blocks.md).
        strict: Raise where something cannot be pruned for lack of understanding,
            instead of leaving it alone and reporting it.
        max_nonfinite: Iterations in a row with gradients that are not finite, after
            which it is an error; one such iteration is merely not counted.
        statistics_interval: Iterations from one that is watched to the next; those
            between cost what plain training costs, and decisions rest on less.
        compact_interval: After so many iterations, at the next decision, what was
            pruned is cut out of the model, its optimizer and its averaged copy, so that
            iterations get faster; None only masks it until the end.
        compensate: How layers that read what a decision takes are refitted right after
            it: ``'fisher'``, ``'least_squares'``, ``'bn'`` (statistics of batch norms
            only), ``'none'``, or ``dict(method=..., images=256, ...)`` with options of
            `CompensationConfig`; it takes its time, for decisions that are few.
        input_shape: (C, H, W) of the image for which costs are counted; by default the
            size of the latency profile, or of the first training batch.
        latency_profile: A file that tools/profile_latency.py wrote for this model; it
            makes ``latency`` a cost.

    Raises:
        ConfigError: If an option is out of range or at odds with another one.

    Examples:
        >>> config = PruningConfig(target=dict(flops=0.5), units_per_step='auto')
        >>> config.targets
        (Target(cost='flops', ratio=0.5),)
        >>> PruningConfig.of(config, divisor=8).divisor
        8
    """

    target: Any = field(default_factory=lambda: {'flops': 0.5})
    interval: int = 10
    criterion: Spec = 'fisher'
    normalize: str = 'memory'
    scope: str = 'global'
    ratios: Any = None
    units_per_step: int | str = 1
    iterations: int | None = None
    schedule: Spec | None = None
    divisor: int | str = 1
    min_channels: int = 1
    max_ratio: float = 1.0
    keep: Sequence[str] = ()
    recover: bool = False
    coupled: bool = True
    blocks: bool = False
    strict: bool = False
    max_nonfinite: int = 100
    statistics_interval: int = 1
    compact_interval: int | None = None
    compensate: Spec = 'none'
    input_shape: Sequence[int] | None = None
    latency_profile: str | None = None
    profile: LatencyProfile | None = field(
        init=False, default=None, repr=False, compare=False
    )

    @classmethod
    def of(
        cls, config: PruningConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> PruningConfig:
        """Return a configuration with some of its options changed.

        Args:
            config: What to start from; the defaults if None.
            **options: Options by name.

        Raises:
            ConfigError: If an option is unknown or not valid.
        """
        if isinstance(config, Mapping):
            options = {**config, **options}
        elif config is not None and not isinstance(config, cls):
            expected = 'a PruningConfig or a dict of its fields'
            raise ConfigError('config', expected, repr(config), 'give options by name')
        check_known('pruning', options, [f.name for f in fields(cls) if f.init])
        return replace(config, **options) if isinstance(config, cls) else cls(**options)

    @classmethod
    def for_runner(
        cls, config: PruningConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> PruningConfig:
        """Return a configuration as `of` does, with `RUNNER_DIVISOR` by default.

        Raises:
            ConfigError: If an option is unknown or not valid.

        Examples:
            >>> PruningConfig.for_runner(interval=5).divisor
            8
        """
        if config is None or isinstance(config, Mapping):
            options = {'divisor': RUNNER_DIVISOR, **(config or {}), **options}
            config = None
        return cls.of(config, **options)

    def __post_init__(self) -> None:
        interval = self.build_schedule().interval(self.interval)
        object.__setattr__(self, 'interval', interval)
        self._check_counts()
        is_share = isinstance(self.max_ratio, int | float) and 0 < self.max_ratio <= 1
        check('max_ratio', is_share, 'a number in (0, 1]', self.max_ratio)
        for name in ('recover', 'coupled', 'blocks', 'strict'):
            value = getattr(self, name)
            check(name, isinstance(value, bool), 'True or False', value)
        is_list = isinstance(self.keep, list | tuple)
        is_list = is_list and all(isinstance(k, str) for k in self.keep)
        check('keep', is_list, 'a list of layer names or patterns', self.keep)
        object.__setattr__(self, 'keep', tuple(self.keep))
        read_compensation(self.compensate)  # which checks it
        self._check_normalize()
        self._read_profile()
        object.__setattr__(self, 'ratios', read_ratios(self.scope, self.ratios))
        schedule, criterion = self.build_schedule(), self.build_criterion()
        schedule.check(self.interval, self.targets)
        if self.blocks:
            check_scores_blocks(criterion, self.criterion, self.scope)
        if schedule.needs_additive and not criterion.additive:
            raise ConfigError(
                'units_per_step or schedule',
                f'one that goes with the criterion {self.criterion!r}',
                type(schedule).__name__,
                'its scores do not add up: give a number of units, iterations or '
                'another schedule',
            )
        if self.recover:
            refused = {
                'criterion': None if criterion.scores_pruned else self.criterion,
                'compact_interval': self.compact_interval,
                'compensate': self.compensation and self.compensate,
                'blocks': self.blocks or None,
            }
            check_recovery(schedule, self.targets, refused)

    def _check_counts(self) -> None:
        for name in ('interval', 'min_channels', 'max_nonfinite'):
            check_count(name, getattr(self, name))
        if self.divisor != 'auto':
            expected = 'a whole number of at least 1, or auto'
            check_count('divisor', self.divisor, expected)
        every, interval = self.statistics_interval, self.interval
        check_count('statistics_interval', every)
        expected = f'at most the interval, {interval}'
        check('statistics_interval', every <= interval, expected, every)
        if self.compact_interval is not None:
            check_count('compact_interval', self.compact_interval)
        if self.input_shape is not None:
            shape = self.input_shape
            is_shape = isinstance(shape, list | tuple) and len(shape) == 3
            check('input_shape', is_shape, '(C, H, W)', shape)
            for size in shape:
                check_count('input_shape', size, 'three whole numbers of at least 1')
            object.__setattr__(self, 'input_shape', tuple(shape))

    def _check_normalize(self) -> None:
        known = [name for name in COSTS.names() if COSTS[name].is_normalizer]
        is_known = self.normalize == NO_NORMALIZATION or (
            self.normalize in COSTS and COSTS[self.normalize].is_normalizer
        )
        names = ', '.join(['flops', *known, NO_NORMALIZATION])
        check('normalize', is_known, f'one of {names}', self.normalize)

    def _read_profile(self) -> None:
        """Read the latency profile; its input size is that of the run."""
        names = {*(t.cost for t in self.targets), self.normalize} - {NO_NORMALIZATION}
        asked = [f'{n!r}' for n in sorted(names) if COSTS[n].from_profile]
        asked += ["divisor='auto'"] if self.divisor == 'auto' else []
        profile = read_profile(self.latency_profile, asked, self.input_shape)
        object.__setattr__(self, 'profile', profile)
        if profile is not None:
            object.__setattr__(self, 'input_shape', profile.input_shape)

    @property
    def costs(self) -> dict[str, Cost]:
        """Costs that this run has a profile for, by name."""
        return {} if self.profile is None else {'latency': Latency(self.profile)}

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, parsed."""
        return parse_targets(self.target)

    @property
    def limiting(self) -> list[str]:
        """Names of the options that limit what may go, but for the divisor."""
        in_force = {
            'keep': bool(self.keep),
            'coupled': not self.coupled,
            'min_channels': self.min_channels > 1,
            'max_ratio': self.max_ratio < 1,
            'ratios': self.ratios is not None,
        }
        return [name for name, is_in_force in in_force.items() if is_in_force]

    @property
    def compensation(self) -> InTraining | None:
        """How decisions are made up for, None if they are not."""
        return read_compensation(self.compensate)

    def build_criterion(self) -> Criterion:
        """Return a new criterion."""
        return CRITERIA.build(self.criterion)

    def build_schedule(self) -> Schedule:
        """Return the schedule that the options ask for."""
        return build_schedule(self.schedule, self.units_per_step, self.iterations)
