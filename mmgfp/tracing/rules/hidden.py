"""Ops that hide what they run from the graph."""

from __future__ import annotations

from mmgfp.tracing.registry import Operands, register_rule
from mmgfp.tracing.value import Context, Value


@register_rule('CheckpointFunction')
def checkpoint(ctx: Context, operands: Operands) -> list[Value]:
    """Keep what a part reads that is run again in backward, which builds its graph.

    Discovery runs such parts without checkpointing. A loss that was computed before
    may hold some.
    """
    for value in operands:
        ctx.freeze_value(value, 'checkpointed without use_reentrant=False by')
    return [Value(shape) for shape in ctx.out_shapes]
