"""Which channels are coupled, read off the autograd graph of a real loss."""

from mmgfp.tracing.attention import (
    ATTENTION_SPECS,
    AttentionSpec,
    attention_spec,
    update_head_counts,
)
from mmgfp.tracing.labels import NO_LABEL
from mmgfp.tracing.registry import (
    LABEL_RULES,
    ROW_RULES,
    OpRegistry,
    register_row_rule,
    register_rule,
)
from mmgfp.tracing.rows import RowUse, judge_rows, watch_rows
from mmgfp.tracing.tracer import Trace, trace_loss
from mmgfp.tracing.value import Context, LayerCall, Value
from mmgfp.tracing.widths import watch_widths, width_attributes

__all__ = [
    'ATTENTION_SPECS',
    'NO_LABEL',
    'ROW_RULES',
    'LABEL_RULES',
    'OpRegistry',
    'RowUse',
    'Context',
    'AttentionSpec',
    'LayerCall',
    'Trace',
    'Value',
    'update_head_counts',
    'attention_spec',
    'judge_rows',
    'register_row_rule',
    'register_rule',
    'trace_loss',
    'watch_rows',
    'watch_widths',
    'width_attributes',
]
