"""The one table of op rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmgfp.tracing.value import Context, Value

Operands = Sequence[Value | None]
Rule = Callable[[Context, Operands], Value | list[Value]]

#: Rules by op name: the autograd node's name without ``Backward`` and digits.
RULES: dict[str, Rule] = {}


def register_rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ``ops``.

    Args:
        ops: Names of autograd nodes without ``Backward`` and digits, such as
            ``'Convolution'``.

    Raises:
        KeyError: An op has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for op in ops:
            if op in RULES:
                raise KeyError(
                    f'op {op!r} has the rule {RULES[op].__name__} already; '
                    f'change that one'
                )
            RULES[op] = rule
        return rule

    return register
