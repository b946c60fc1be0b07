"""Which channels are coupled, read off the autograd graph of a real loss."""

from mmgfp.tracing.attention import HEAD_KINDS, HeadKind, count_heads, head_kind
from mmgfp.tracing.labels import NO_LABEL
from mmgfp.tracing.row_rules import ROW_RULES, register_row_rule
from mmgfp.tracing.rows import RowUse, judge_rows, watch_rows
from mmgfp.tracing.rules import RULES, register_rule
from mmgfp.tracing.tracer import Trace, trace_loss
from mmgfp.tracing.value import Context, LayerCall, Value
from mmgfp.tracing.widths import watch_widths, width_attributes

__all__ = [
    'HEAD_KINDS',
    'NO_LABEL',
    'ROW_RULES',
    'RULES',
    'RowUse',
    'Context',
    'HeadKind',
    'LayerCall',
    'Trace',
    'Value',
    'count_heads',
    'head_kind',
    'judge_rows',
    'register_row_rule',
    'register_rule',
    'trace_loss',
    'watch_rows',
    'watch_widths',
    'width_attributes',
]
