"""Registries of op rules: one for labels and one for rows.

An op goes by the name of its autograd node without ``Backward`` and digits:
``y.grad_fn.name()`` is ``AddmmBackward0`` for a fully connected layer, whose op is
``Addmm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmgfp.tracing.row_values import RowState
from mmgfp.tracing.value import Context, Value

Rule = TypeVar('Rule', bound=Callable[..., Any])

#: None stands for an operand that needs no gradient, such as an image or a constant.
Operands = Sequence[Value | None]
LabelRule = Callable[[Context, Operands], Value | list[Value]]
RowRule = Callable[[Context, Sequence[RowState]], 'RowState | list[RowState]']


class OpRegistry(dict[str, Rule]):
    """Rules by the name of their op; each op has one at most.

    Args:
        kind: What an error calls the rules.

    Examples:
        >>> rules = OpRegistry('label rule')
        >>> @rules.register('Sin', 'Cos')
        ... def elementwise(ctx, operands):
        ...     return operands[0]
        >>> rules['Cos'].__name__
        'elementwise'
        >>> rules.register('Sin')(elementwise)
        Traceback (most recent call last):
        KeyError: "op 'Sin' has the label rule elementwise already; change that one"
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, *ops: str) -> Callable[[Rule], Rule]:
        """Return a decorator that makes a function the rule of ``ops``.

        Args:
            ops: Names of the ops, such as ``'Convolution'``.

        Raises:
            KeyError: If an op has a rule already.
        """

        def decorate(rule: Rule) -> Rule:
            for op in ops:
                if op in self:
                    raise KeyError(
                        f'op {op!r} has the {self.kind} {self[op].__name__} already; '
                        f'change that one'
                    )
                self[op] = rule
            return rule

        return decorate


#: How each op hands labels from its operands to its results.
LABEL_RULES: OpRegistry[LabelRule] = OpRegistry('label rule')
#: How each op hands the images of its rows from its operands to its results.
ROW_RULES: OpRegistry[RowRule] = OpRegistry('row rule')

register_rule = LABEL_RULES.register
register_row_rule = ROW_RULES.register
