"""Coupled channels, read off the autograd graph of a real loss."""

from mmgfp.tracing.attention import (
    ATTENTION_SPECS,
    AttentionSpec,
    attention_spec,
    update_head_counts,
)
from mmgfp.tracing.buffers import watch_buffers
from mmgfp.tracing.labels import NO_LABEL
from mmgfp.tracing.registry import (
    LABEL_RULES,
    ROW_RULES,
    OpRegistry,
    register_row_rule,
    register_rule,
)
from mmgfp.tracing.row_use import RowUse, judge_rows, watch_rows
from mmgfp.tracing.rules.arithmetic import register_elementwise
from mmgfp.tracing.tracer import Trace, trace_loss
from mmgfp.tracing.value import Context, LayerCall, Value
from mmgfp.tracing.widths import watch_widths, width_attributes

__all__ = [
    'ATTENTION_SPECS',
    'LABEL_RULES',
    'NO_LABEL',
    'ROW_RULES',
    'AttentionSpec',
    'Context',
    'LayerCall',
    'OpRegistry',
    'RowUse',
    'Trace',
    'Value',
    'attention_spec',
    'judge_rows',
    'register_elementwise',
    'register_row_rule',
    'register_rule',
    'trace_loss',
    'update_head_counts',
    'watch_buffers',
    'watch_rows',
    'watch_widths',
    'width_attributes',
]
