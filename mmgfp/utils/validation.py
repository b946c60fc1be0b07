"""Checks of single option values."""

from __future__ import annotations

from typing import Any

from mmgfp.utils.errors import ConfigError

WHOLE = 'a whole number of at least 1'


def check_count(
    field: str, value: object, expected: str = WHOLE, least: int = 1
) -> None:
    """Refuse anything but a whole number of at least ``least``.

    Raises:
        ConfigError: If it is something else.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    check(field, is_whole and value >= least, expected, value)  # type: ignore[operator]


def check(field: str, is_valid: bool, expected: str, got: object) -> None:
    """Refuse a value unless it ``is_valid``.

    Raises:
        ConfigError: If it is not.
    """
    if not is_valid:
        raise ConfigError(field, expected, repr(got), 'change the configuration')


def check_not_compiled(model: Any) -> None:
    """Refuse a module that torch.compile has wrapped, or torch.jit has compiled.

    Parts that torch.jit has compiled are left alone, but frozen ones are refused: in
    double precision, in which verification calls them, they may end the process.

    Raises:
        ConfigError: If it is one, or has a frozen part.
    """
    if hasattr(model, '_orig_mod') or getattr(model, '_compiled_call_impl', None):
        raise ConfigError(
            'model',
            'a module without torch.compile, as pruning looks into every layer',
            f'a compiled {type(getattr(model, "_orig_mod", model)).__name__}',
            'prune first; the compact model can be compiled for fine-tuning',
        )
    # By its name, because this module does without torch.
    if type(model).__module__.startswith('torch.jit'):
        raise ConfigError(
            'model',
            'a module not compiled by torch.jit, as pruning looks into every layer',
            f'a {type(model).__name__}',
            'prune first; the compact model can be scripted',
        )
    for name, module in model.named_modules():
        is_compiled = type(module).__module__.startswith('torch.jit')
        if is_compiled and not module._c.hasattr('training'):  # freezing takes it away
            raise ConfigError(
                'model',
                'without parts that torch.jit.freeze has frozen',
                name,
                'script or trace them without freezing; they keep their channels',
            )


def refuse_copy(self: Any, protocol: object) -> Any:
    """Refuse to copy or pickle an object whose hooks are on one model.

    Raises:
        ConfigError: Always.
    """
    name = type(self).__name__
    raise ConfigError(
        f'a {name} cannot be copied or pickled, as its hooks stay on this model (got '
        f'copy, deepcopy or pickle); give state_dict() to load_state_dict of a new '
        f'{name} of the other model, unpruned'
    )
