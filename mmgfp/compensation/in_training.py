"""The option of a training run that says how decisions are made up for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmgfp.compensation.options import FEW_ROWS, METHODS, CompensationConfig
from mmgfp.utils.errors import ConfigError
from mmgfp.utils.registry import check_known
from mmgfp.utils.validation import check_count

NONE = 'none'
#: Training images that layers are refitted on.
IMAGES = 256


@dataclass(frozen=True)
class InTraining:
    """How the decisions of a training run are made up for.

    Attributes:
        images: Number of training images that layers are refitted on.
        config: How they are refitted.
    """

    images: int
    config: CompensationConfig


def read_compensation(spec: str | Mapping[str, Any]) -> InTraining | None:
    """Read ``compensate``, an option of pruning.

    Args:
        spec: A method, ``'none'``, or a dict with ``method`` (``'fisher'`` by default),
            ``images`` and options of `CompensationConfig`.

    Returns:
        InTraining: The options; None for ``'none'``.

    Raises:
        ConfigError: If an option is unknown or out of range.

    Examples:
        >>> read_compensation(dict(method='bn', images=64)).images
        64
        >>> read_compensation('none') is None
        True
    """
    options: dict[str, Any] = (
        dict(spec) if isinstance(spec, Mapping) else {'method': spec}
    )
    method = options.setdefault('method', METHODS[0])
    if method == NONE:
        return None
    if method not in METHODS:
        expected = f'one of {(NONE, *METHODS)}, or a dict with one as its method'
        raise ConfigError('compensate', expected, repr(spec), "use 'fisher'")
    known = ['images', *(f.name for f in fields(CompensationConfig))]
    check_known('compensate', options, known)
    images = options.pop('images', IMAGES)
    check_count('compensate.images', images, 'a whole number of at least 2', least=2)
    for name in ('uniform', 'ridges'):  # which configs give as lists
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    return InTraining(images, CompensationConfig(**{'rows': FEW_ROWS, **options}))
