"""The options of a run that sets single weights to zero, each written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmgfp.selection.schedules import cubic_share
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.validation import check, check_count

#: Options that one kind has and others have not, with what they begin with.
UNSTRUCTURED: dict[str, Any] = {'sparsity': 0.8, 'scope': 'global', 'schedule': 'cubic'}
N_OF_M: dict[str, Any] = {'n': 2, 'm': 4, 'sr_ste': True, 'decay': 2e-4}
KINDS = {'magnitude': UNSTRUCTURED, 'movement': UNSTRUCTURED, 'nm': N_OF_M}
SCHEDULES = ('cubic', 'linear', 'one_shot')


@dataclass(frozen=True)
class SparsityConfig:
    """Options of a run that sets weights to zero, checked when they are given.

    Attributes:
        kind: ``'magnitude'`` keeps the largest weights (Han et al. 2015, arXiv
            1506.02626), ``'movement'`` those that training moves away from zero (Sanh
            et al. 2020, arXiv 2005.07683), ``'nm'`` the n largest of every m along the
            inputs of a layer.
        sparsity: The share of weights that are zero at the end, 0.8 by default; with
            ``'nm'`` it is 1 - n / m.
        scope: ``'global'`` if the weights of all layers compete, ``'local'`` if each
            layer loses the same share.
        schedule: ``'cubic'`` (Zhu and Gupta 2017, arXiv 1710.01878), ``'linear'``, or
            ``'one_shot'``, all at ``begin``; ``'nm'`` knows no other.
        begin: Iterations, or epochs, before the first weights go.
        end: Iterations, or epochs, after which all are gone; by default those at half
            of the way from ``begin`` to the end of the run.
        by_epoch: Whether ``begin`` and ``end`` are epochs.
        interval: Iterations from one decision to the next.
        n: Weights that stay of each group, 2 by default.
        m: Weights of a group, 4 by default.
        sr_ste: Whether n:m sparsity is trained by SR-STE (Zhou et al. 2021, arXiv
            2102.04010), so that weights may change places; False chooses them once.
        decay: Its factor on weights that are zero, 2e-4 by default.
        keep: Names or glob patterns of layers that stay dense.

    Raises:
        ConfigError: If an option is out of range, or of another kind.

    Examples:
        >>> SparsityConfig().density, SparsityConfig(kind='nm').density
        (0.2, 0.5)
    """

    kind: str = 'magnitude'
    sparsity: float | None = None
    scope: str | None = None
    schedule: str | None = None
    begin: int = 0
    end: int | None = None
    by_epoch: bool = False
    interval: int = 100
    n: int | None = None
    m: int | None = None
    sr_ste: bool | None = None
    decay: float | None = None
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = ', '.join(map(repr, KINDS))
        is_known = isinstance(self.kind, str) and self.kind in KINDS
        check('kind', is_known, f'one of {names}', self.kind)
        if self.kind == 'nm' and self.schedule is None:
            object.__setattr__(self, 'schedule', 'one_shot')
        self._take_defaults()
        self._check_times()
        is_list = isinstance(self.keep, list | tuple)
        is_list = is_list and all(isinstance(k, str) for k in self.keep)
        check('keep', is_list, 'a list of layer names or patterns', self.keep)
        object.__setattr__(self, 'keep', tuple(self.keep))
        if self.kind == 'nm':
            self._check_n_of_m()
        else:
            self._check_unstructured()

    def _take_defaults(self) -> None:
        """Fill in what was not given; refuse what has no meaning for the kind."""
        for name in {**UNSTRUCTURED, **N_OF_M}:
            value = getattr(self, name)
            if name in KINDS[self.kind]:
                default = KINDS[self.kind][name]
                object.__setattr__(self, name, default if value is None else value)
            elif value is not None and name != 'schedule':
                raise ConfigError(
                    name, f'left out with kind={self.kind!r}', repr(value), 'drop it'
                )

    def _check_times(self) -> None:
        is_known = self.schedule in SCHEDULES
        check('schedule', is_known, f'one of {", ".join(SCHEDULES)}', self.schedule)
        is_flag = isinstance(self.by_epoch, bool)
        check('by_epoch', is_flag, 'True or False', self.by_epoch)
        check_count('interval', self.interval)
        check_count('begin', self.begin, 'a whole number of at least 0', least=0)
        if self.end is None:
            return
        expected = f'a whole number above begin, {self.begin}'
        check_count('end', self.end, expected, least=self.begin + 1)
        if self.schedule == 'one_shot':
            raise ConfigError(
                'end', "left out with schedule='one_shot'", repr(self.end), 'drop it'
            )

    def _check_unstructured(self) -> None:
        is_share = type(self.sparsity) is float and 0 < self.sparsity < 1
        check('sparsity', is_share, 'a number in (0, 1)', self.sparsity)
        check('scope', self.scope in ('global', 'local'), 'global or local', self.scope)
        if (self.kind, self.schedule, self.begin) == ('movement', 'one_shot', 0):
            raise ConfigError(
                'begin',
                "at least 1 with kind='movement' and schedule='one_shot'",
                '0',
                'let some iterations show how weights move',
            )

    def _check_n_of_m(self) -> None:
        check_count('m', self.m, 'a whole number of at least 2', least=2)
        assert self.m is not None and self.n is not None
        check_count('n', self.n)
        check('n', self.n < self.m, f'less than m, {self.m}', self.n)
        check('sr_ste', isinstance(self.sr_ste, bool), 'True or False', self.sr_ste)
        is_number = type(self.decay) in (int, float) and self.decay >= 0  # type: ignore
        check('decay', is_number, 'a number of at least 0', self.decay)
        if self.schedule != 'one_shot':
            raise ConfigError(
                'schedule',
                "'one_shot' with kind='nm', as groups have n weights or all",
                repr(self.schedule),
                'drop it',
            )

    @property
    def density(self) -> float:
        """The share of weights that stay at the end."""
        if self.kind == 'nm':
            assert self.m is not None and self.n is not None
            return self.n / self.m
        assert self.sparsity is not None
        return round(1 - self.sparsity, 12)  # 1 - 0.8 is no 0.2

    def density_after(self, progress: float) -> float:
        """Return the share of weights that stay on the way to the end.

        Args:
            progress: How much of the way lies behind, in [0, 1].
        """
        if self.schedule == 'cubic':
            return cubic_share(self.density, progress)
        return self.density + (1 - self.density) * (1 - progress)


@dataclass(frozen=True)
class Timetable:
    """When weights go.

    Attributes:
        begin: Iterations before the first weights go.
        end: Iterations after which all are gone.
        interval: Iterations from one decision to the next.

    Examples:
        >>> times = Timetable(begin=10, end=35, interval=10)
        >>> {t: times.progress(t) for t in range(60) if times.is_due(t)}
        {20: 0.4, 30: 0.8, 35: 1.0}
        >>> times.decisions
        3
    """

    begin: int
    end: int
    interval: int

    @property
    def decisions(self) -> int:
        """How often weights go."""
        return max(-(-(self.end - self.begin) // self.interval), 1)

    def is_due(self, iteration: int) -> bool:
        """Return whether weights go after so many iterations."""
        is_turn = (iteration - self.begin) % self.interval == 0
        on_the_way = self.begin < iteration < self.end and is_turn
        return on_the_way or iteration == self.end

    def progress(self, iteration: int) -> float:
        """Return how much of the way lies behind, in [0, 1]."""
        if iteration >= self.end:
            return 1.0
        return max(iteration - self.begin, 0) / (self.end - self.begin)


def timetable(config: SparsityConfig, iterations: int, epoch: Any = None) -> Timetable:
    """Return when weights go in a run.

    Args:
        config: The options of the run.
        iterations: Iterations of the run.
        epoch: Iterations of an epoch, for a config by epochs.

    Raises:
        ConfigError: If ``begin`` or ``end`` is behind the end of the run.
    """
    unit = epoch if config.by_epoch else 1
    begin = config.begin * unit
    end = begin if config.schedule == 'one_shot' else None
    if end is None:
        halfway = begin + max((iterations - begin) // 2, 1)
        end = halfway if config.end is None else config.end * unit
    name = 'begin' if config.end is None else 'end'
    if begin >= iterations or end > iterations:
        what = 'epochs' if config.by_epoch else 'iterations'
        limit = f'{iterations // unit} {what} that the run has'
        raise ConfigError(
            name,
            f'within the {limit}',
            repr(getattr(config, name)),
            'change it, or train longer',
        )
    return Timetable(begin, end, config.interval)
