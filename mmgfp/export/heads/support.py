"""Refusal of heads and options whose results an exported graph could not repeat."""

from __future__ import annotations

from typing import Any

from mmgfp.utils.errors import ConfigError

REMEDY = 'export raw outputs instead (leave --nms out)'
#: Options of NMS that the graph follows, or that change no result.
NMS_OPTIONS = {'type', 'iou_threshold', 'iou_thr', 'class_agnostic', 'split_thr'}


def refuse(field: str, expected: str, got: str) -> ConfigError:
    """Return the error of something that has no end-to-end graph."""
    return ConfigError(field, expected, got, REMEDY)


def inherits(part: Any, base: type, *methods: str) -> bool:
    """Return whether an object's class uses methods of ``base`` as they are.

    A subclass that decodes in its own way is none that a graph written for ``base``
    speaks for.
    """
    if not isinstance(part, base):
        return False
    return all(getattr(type(part), m) is getattr(base, m) for m in methods)


def require_inherited(field: str, part: Any, base: type, *methods: str) -> None:
    """Refuse a part of a model whose class is not ``base`` in these methods.

    Raises:
        ConfigError: If the class is another one, or overrides one of the methods.
    """
    if not inherits(part, base, *methods):
        raise refuse(field, f'a {base.__name__} that predicts as such', _named(part))


def positive(cfg: Any, key: str, where: str) -> int:
    """Return a limit of ``test_cfg``.

    Raises:
        ConfigError: If it is missing or not positive.
    """
    value = cfg.get(key)
    if not isinstance(value, int) or value < 1:
        raise refuse(f'{where}.{key}', 'a positive integer', repr(value))
    return value


def check_nms(cfg: Any, where: str) -> None:
    """Refuse NMS of another kind than the plain one.

    Args:
        cfg: ``test_cfg`` of a head.
        where: Its name.

    Raises:
        ConfigError: If ``cfg.nms`` is not plain NMS.
    """
    nms = cfg.get('nms')
    if not nms or nms.get('type', 'nms') != 'nms' or set(nms) - NMS_OPTIONS:
        raise refuse(f'{where}.nms', "plain NMS, dict(type='nms', ...)", repr(nms))


def iou_threshold(nms: Any) -> float:
    """Return the overlap above which the lower score is dropped."""
    return float(nms['iou_threshold'] if 'iou_threshold' in nms else nms['iou_thr'])


def _named(part: Any) -> str:
    return type(part).__name__
