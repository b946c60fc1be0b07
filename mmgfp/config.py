"""What the arguments of pruning may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmgfp.selection.greedy import NORMALIZATIONS, Target
from mmgfp.utils.errors import ConfigError

WHOLE = 'a whole number of at least 1'


def parse_targets(target: Any) -> list[Target]:
    """Read one target such as ``dict(flops=0.5)``, or a list of them.

    Raises:
        ConfigError: It is none.
    """
    targets = list(target) if isinstance(target, list | tuple) else [target]
    check('target', bool(targets), 'at least one target', target)
    return [Target.parse(t) for t in targets]


def check_options(options: Mapping[str, Any], targets: int) -> None:
    """Refuse what `GroupFisherPruner` cannot work with.

    Args:
        options: Its arguments by name.
        targets: How many targets there are.

    Raises:
        ConfigError: One is of a wrong type, out of range or at odds with another one.
    """
    for field in ('interval', 'divisor', 'min_channels', 'max_nonfinite'):
        check_count(field, options[field])
    interval, at_once = options['interval'], options['units_per_step']
    if at_once != 'auto':
        check_count('units_per_step', at_once, f'{WHOLE}, or auto')
    iterations = options['iterations']
    if iterations is not None:
        least = interval * targets
        expected = f'a whole number, at least the interval for each target: {least}'
        check_count('iterations', iterations, expected, least)
        expected = 'not given beside iterations, which sets the pace'
        check('units_per_step', at_once == 1, expected, at_once)
    every = options['statistics_interval']
    check_count('statistics_interval', every)
    check(
        'statistics_interval',
        every <= interval,
        f'at most the interval, {interval}',
        every,
    )
    ratio = options['max_ratio']
    fine = isinstance(ratio, int | float) and 0 < ratio <= 1
    check('max_ratio', fine, 'a number in (0, 1]', ratio)
    known, cost = ', '.join(NORMALIZATIONS), options['normalize']
    check('normalize', cost in NORMALIZATIONS, f'one of {known}', cost)
    keep = options['keep']
    fine = isinstance(keep, list | tuple) and all(isinstance(k, str) for k in keep)
    check('keep', fine, 'a list of layer names or patterns', keep)
    coupled = options['coupled']
    check('coupled', isinstance(coupled, bool), 'True or False', coupled)


def check_not_compiled(model: Any) -> None:
    """Refuse a module that torch.compile has wrapped.

    Raises:
        ConfigError: It is one.
    """
    if hasattr(model, '_orig_mod') or getattr(model, '_compiled_call_impl', None):
        raise ConfigError(
            'model',
            'a module without torch.compile, as pruning looks into every layer',
            f'a compiled {type(getattr(model, "_orig_mod", model)).__name__}',
            'prune first; the compact model can be compiled for fine-tuning',
        )


def check_count(
    field: str, value: object, expected: str = WHOLE, least: int = 1
) -> None:
    """Refuse anything but a whole number of at least ``least``.

    Raises:
        ConfigError: It is something else.
    """
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= least
    check(field, fine, expected, value)


def check(field: str, fine: bool, expected: str, got: object) -> None:
    """Refuse ``got`` unless it is ``fine``.

    Raises:
        ConfigError: It is not.
    """
    if not fine:
        raise ConfigError(field, expected, repr(got), 'change the configuration')
