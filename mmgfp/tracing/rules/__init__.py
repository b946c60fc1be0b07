"""Label rules: how each op hands labels from its operands to its results.

A rule takes the `Context` of a node and the operands' `Value`s (None where an
operand needs no gradient, such as an image or a constant) and returns the result's
`Value`, or a list where the op has several results. To add an op, write one function
decorated with `register_rule`, in the module that its kind belongs to. Importing this
package fills `LABEL_RULES`.
"""

from mmgfp.tracing.registry import LABEL_RULES
from mmgfp.tracing.rules import (
    arithmetic,
    gather_scatter,
    hidden,
    indexing,
    joining,
    layers,
    products,
    reductions,
    shapes,
    slicing,
)

__all__ = [
    'LABEL_RULES',
    'arithmetic',
    'gather_scatter',
    'hidden',
    'indexing',
    'joining',
    'layers',
    'products',
    'reductions',
    'shapes',
    'slicing',
]
